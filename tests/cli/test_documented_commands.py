"""Every command in the documentation is one that its parser accepts."""

import re
import shlex
from pathlib import Path

import pytest

from hf_unigd.cli.main import main
from hf_unigd.cli.parser import CommandParser


ROOT = Path(__file__).parents[2]
FILES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.py")]
# A line of its own, which a backslash continues, or code in a sentence; without its arguments a command is only named.
COMMAND = re.compile(r"^ *(hf-unigd [a-z-]+ .*?[^\\])$|`(hf-unigd [a-z-]+ [^`]+)`", re.MULTILINE | re.DOTALL)


def documented() -> list[tuple[str, str]]:
    found = [
        (file.name, " ".join(command.replace("\\\n", " ").split()))
        for file in FILES
        for match in COMMAND.findall(file.read_text(encoding="utf-8"))
        for command in filter(None, match)
    ]
    return sorted({(file, command) for file, command in found if "..." not in command and "--help" not in command})


class ParsedError(BaseException):
    """Stops a command that has parsed its arguments."""


@pytest.mark.parametrize(("file", "command"), documented())
def test_it_parses(file, command, monkeypatch, tmp_path):
    parse = CommandParser.parse

    def parse_only(self, argv):
        parse(self, argv)
        raise ParsedError

    monkeypatch.setattr(CommandParser, "parse", parse_only)
    (tmp_path / "recipe.yaml").write_text("model_name_or_path: m\ndataset_name: d\n")
    # What stands for a number, for one of several words, or for a file that is read.
    stand_ins = {"A": "0", "B": "1", "TYPE": "IVF_FLAT", "recipe.yaml": str(tmp_path / "recipe.yaml")}
    command = command.replace("--config FILE", "--config recipe.yaml")
    words = [stand_ins.get(word, word) for word in shlex.split(command, comments=True)]
    if words[1] == "train":
        words += ["--use_cpu", "true"]  # `--bf16` is refused on a machine without a GPU otherwise
    with pytest.raises(ParsedError):
        main(words[1:])


def test_the_documentation_has_commands():
    assert {command.split()[1] for _, command in documented()} >= {"train", "evaluate", "generate", "doctor", "push"}
