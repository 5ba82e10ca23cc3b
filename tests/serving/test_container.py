"""The Dockerfile and the compose file agree with each other and with the package. No container is built here."""

import json
import re
from pathlib import Path

import pytest
import yaml

from hf_unigd.cli import serve
from hf_unigd.cli.parser import CommandParser


ROOT = Path(__file__).parents[2]


def instructions(name):
    """The arguments of all instructions of the Dockerfile of a name, with continued lines joined."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    return re.findall(rf"^{name} (.+)$", text, re.MULTILINE)


@pytest.fixture
def service():
    return yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["serve"]


def defaults(text):
    """What compose makes of `${NAME:-default}` and `${NAME:?message}`."""
    return re.sub(r"\$\{\w+:([-?])([^}]*)\}", lambda found: found[2] if found[1] == "-" else "value", text)


def test_compose_builds_what_the_dockerfile_builds_by_default(service):
    declared = dict(argument.split("=") for argument in instructions("ARG"))
    assert {name: defaults(value) for name, value in service["build"]["args"].items()} == declared


def test_the_image_has_extras_that_exist_and_the_page(service):
    extras = dict(argument.split("=") for argument in instructions("ARG"))["EXTRAS"].split(",")
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras) <= known.keys() and "app" in extras
    assert any(line.startswith("gradio") for line in known["app"])


def test_the_command_is_one_that_serve_takes_at_the_port_that_is_published(service, monkeypatch):
    (entrypoint,) = map(json.loads, instructions("ENTRYPOINT"))
    parsed = []
    parse = CommandParser.parse

    def parse_only(self, argv):
        parsed.extend(parse(self, argv))
        raise KeyboardInterrupt

    monkeypatch.setattr(CommandParser, "parse", parse_only)
    assert entrypoint[:2] == ["hf-unigd", "serve"]
    with pytest.raises(KeyboardInterrupt):
        serve.main([*entrypoint[2:], *map(defaults, service["command"])])
    (arguments,) = parsed
    assert arguments.host == "0.0.0.0" and arguments.api_key == "value"
    (published,) = service["ports"]
    assert published == f"127.0.0.1:8000:{arguments.port}"
    assert instructions("EXPOSE") == [str(arguments.port)]


def test_all_that_is_written_is_on_a_volume_or_in_memory(service):
    assert service["read_only"] is True and service["tmpfs"] == ["/tmp"]
    (volume,) = instructions("VOLUME")
    assert f"cache:{volume}" in service["volumes"]
    environment = dict(word.split("=") for line in instructions("ENV") for word in line.split())
    assert environment["HF_HOME"] == volume and environment["MPLCONFIGDIR"].startswith("/tmp/")


def test_what_is_copied_is_in_the_context():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for line in instructions("COPY"):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists() and f"!{source}" in ignored
