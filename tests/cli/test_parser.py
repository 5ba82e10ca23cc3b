"""The parser of the commands: by name, by position and from YAML."""

import shlex
from dataclasses import dataclass, field

import pytest

from hf_unigd.cli.parser import CommandParser


@dataclass
class CopyArguments:
    source: str = field(metadata={"help": "Folder to copy."})
    count: int = field(metadata={"help": "How often to copy it.", "metavar": "N"})
    mode: str = field(default="fast", metadata={"help": "How to copy.", "choices": ["fast", "safe"]})
    names: list[str] | None = field(default=None, metadata={"help": "Names of the copies."})


@dataclass
class LogArguments:
    verbose: bool = field(default=False, metadata={"help": "Print more."})


def parse(arguments, *more):
    parser = CommandParser("copy", CopyArguments, *more, description="Copy a folder.")
    return parser.parse(shlex.split(arguments))


@pytest.fixture
def config(tmp_path):
    def write(text):
        (tmp_path / "config.yaml").write_text(text)
        return f"--config {tmp_path / 'config.yaml'}"

    return write


@pytest.mark.parametrize(
    "arguments",
    [
        "a 3",
        "--source a --count 3",
        "--source=a 3",
        "a --count 3",
        "3 --source a",
        "--mode fast a 3",
        "a --mode fast 3",
    ],
)
def test_arguments_without_a_default_are_given_by_name_or_by_position(arguments):
    assert parse(arguments) == (CopyArguments("a", 3),)


def test_positional_arguments_are_converted_and_may_be_negative():
    assert parse("a -3")[0].count == -3


def test_several_dataclasses_are_filled():
    assert parse("a 3 --verbose --names x y", LogArguments) == (
        CopyArguments("a", 3, names=["x", "y"]),
        LogArguments(verbose=True),
    )


def test_the_command_line_overrides_the_file(config):
    file = config("source: a\ncount: 3\nmode: safe\nnames: [x, y]\n")
    assert parse(file) == (CopyArguments("a", 3, "safe", ["x", "y"]),)
    assert parse(f"b {file} --mode fast") == (CopyArguments("b", 3, "fast", ["x", "y"]),)
    assert parse(f"{file} b 4".replace("--config ", "--config=")) == (CopyArguments("b", 4, "safe", ["x", "y"]),)
    assert parse(f"4 --source b {file}") == (CopyArguments("b", 4, "safe", ["x", "y"]),)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the following arguments are required: --source, --count"),
        ("a", "the following arguments are required: --count"),
        ("--source a", "the following arguments are required: --count"),
        ("a 3 b c", "unrecognized arguments: b c\n"),
        ("--source a 3 b", "unrecognized arguments: b\n"),
        ("a 3 --mod3 fast", "unrecognized arguments: --mod3 fast\n"),
        ("a three", "argument --count: invalid int value: 'three'"),
        ("a 3 --mode slow", "argument --mode: invalid choice: 'slow'"),
        ("a 3 --config", "argument --config: expected one argument"),
    ],
)
def test_mistakes_print_the_usage_and_the_reason(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(arguments)
    printed = capsys.readouterr().err
    assert exit_.value.code == 2
    assert printed.startswith("usage: hf-unigd copy SOURCE N [--config FILE.yaml]") and message in printed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("source: a\ncount: 3\nmod: fast\nconfig: b", "unknown keys in the YAML file: config, mod\n"),
        ("source: a\ncount: 3\nmode: slow", "argument --mode: invalid choice: 'slow' (choose from 'fast', 'safe')\n"),
        ("source: a\ncount: three", "argument --count: invalid int value: 'three'\n"),
        ("source: a", "the following arguments are required: --count\n"),
    ],
)
def test_mistakes_in_the_file_are_named(text, message, config, capsys):
    with pytest.raises(SystemExit):
        parse(config(text))
    assert message in capsys.readouterr().err


def test_a_file_that_is_no_yaml_is_named(config):
    with pytest.raises(ValueError, match=r"config\.yaml is not valid YAML"):
        parse(config("source: [a"))
    with pytest.raises(ValueError, match=r"config\.yaml must contain a YAML mapping"):
        parse(config("- a"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        parse("--config nowhere.yaml")


def test_help_shows_positional_arguments_and_how_to_name_them(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse("--help")
    words = " ".join(capsys.readouterr().out.split())
    assert exit_.value.code == 0
    assert words.startswith("usage: hf-unigd copy SOURCE N [--config FILE.yaml] [--NAME VALUE ...] [--help] Copy a")
    assert "--source SOURCE Folder to copy. --count N How often to copy it. --mode {fast,safe}" in words
    assert words.endswith("The positional arguments may also be given by name: --source SOURCE --count N")


@dataclass
class MergeArguments:
    target: str = field(metadata={"help": "File to write."})
    sources: list[str] = field(metadata={"help": "Files to merge."})
    mode: str = field(default="safe", metadata={"help": "How."})


@pytest.mark.parametrize(
    "line",
    [
        "t a b",
        "t a b --mode safe",
        "--mode safe t a b",
        "a b --target t",
        "t --sources a b",
        "--sources a b --target t",
    ],
)
def test_the_last_positional_argument_may_be_a_list(line):
    parser = CommandParser("merge", MergeArguments, description="Merge files.")
    assert parser.parse(line.split()) == (MergeArguments("t", ["a", "b"]),)


def test_a_list_of_positional_arguments_is_not_empty(capsys):
    parser = CommandParser("merge", MergeArguments, description="Merge files.")
    with pytest.raises(SystemExit):
        parser.parse(["t"])
    assert "the following arguments are required: --sources" in capsys.readouterr().err
