"""A Space that is pushed to a hub on the loopback by the unmodified client."""

import pytest

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from loopback_hub import TOKENS, run_client, running_hub
from tiny_models import make_vlm


PUSH = """
from hf_unigd.cli.main import main

def app(space, model, output, *more):
    return outcome(lambda: main(["app", space, model, "--output", output, "--push", "true", *more]))

answers["model"] = outcome(lambda: main(["push", {model!r}, "ada/model"]))
answers["copied"] = app("ada/space", {model!r}, "first")
answers["named"] = app("ada/space", "ada/model", "second")
answers["secret"] = app("ada/secret", "ada/model", "third", "--private", "true")
answers["public"] = app("ada/space", "ada/model", "fourth", "--private", "true")
answers["others"] = app("bob/space", "ada/model", "fifth")
"""


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ada")
    tiny = make_vlm()
    model = UniGDForConditionalGeneration.from_vlm(tiny.model)
    model.processor = UniGDProcessor(tiny.processor)
    model.save_pretrained(folder / "model")
    with running_hub(**TOKENS) as hub:
        answers, _ = run_client(hub, folder, PUSH.format(model=str(folder / "model")))
        yield answers, hub, folder


def test_a_space_holds_what_was_written_last(pushed):
    answers, hub, folder = pushed
    assert answers["copied"] == answers["named"] == "None"
    _, first, second = hub.repositories["ada/space"].refs["main"]
    for name, (_, files) in {"first": first, "second": second}.items():
        written = {file.relative_to(folder / name).as_posix(): file for file in (folder / name).rglob("*")}
        expected = {path: file.read_bytes() for path, file in written.items() if file.is_file()}
        assert {path: content for path, content in files.items() if path != ".gitattributes"} == expected
    assert "model/model.safetensors" in first[1] and "model/model.safetensors" not in second[1]
    assert b"model: ada/model\n" in second[1]["serve.yaml"] and b"- ada/model" in second[1]["README.md"]


def test_it_is_a_docker_space_and_private_where_that_is_wanted(pushed):
    answers, hub, _ = pushed
    assert ("POST", "/api/spaces/ada/space/commit/main") in hub.requests
    assert answers["secret"] == "None" and hub.repositories["ada/secret"].private
    assert not hub.repositories["ada/space"].private
    assert "ada/space exists already and is public" in answers["public"]
    assert "bob/space: You don't have the rights" in answers["others"] and "choose a name" in answers["others"]
