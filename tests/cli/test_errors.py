"""An error of a command is one line and a status, and `--debug` shows where it comes from.

`tests/attack/commands.py` has what commands refuse, and how they are interrupted.
"""

import sys
from types import ModuleType

import pytest

from hf_unigd.cli.main import main


def command_that_raises(monkeypatch, error):
    module = ModuleType("hf_unigd.cli.generate")

    def run(argv):
        assert "--debug" not in argv
        raise error

    module.main = run
    monkeypatch.setitem(sys.modules, "hf_unigd.cli.generate", module)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("Row 3 is bad."), "hf-unigd generate: Row 3 is bad."),
        (RuntimeError("x does not compute what it did."), "hf-unigd generate: x does not compute what it did."),
        (KeyError("name"), "hf-unigd generate: KeyError: 'name' (`--debug` shows where)"),
        (StopIteration(), "hf-unigd generate: StopIteration (`--debug` shows where)"),
        (ValueError(), "hf-unigd generate: ValueError (`--debug` shows where)"),
        (RuntimeError("Sizes differ:\n\ta: 1\n\tb: 2"), "hf-unigd generate: Sizes differ: a: 1 b: 2"),
        (ValueError("x" * 700), f"hf-unigd generate: {'x' * 600} ... (`--debug` shows where)"),
    ],
)
def test_an_error_is_one_line_and_debug_shows_all(monkeypatch, error, line):
    command_that_raises(monkeypatch, error)
    with pytest.raises(SystemExit) as exit:
        main(["generate", "out"])
    assert exit.value.code == line
    with pytest.raises(type(error)):
        main(["generate", "out", "--debug"])


def test_debug_with_a_value_is_the_argument_of_the_trainer(monkeypatch):
    module, seen = ModuleType("hf_unigd.cli.train"), []
    module.main = seen.extend
    monkeypatch.setitem(sys.modules, "hf_unigd.cli.train", module)
    main(["train", "--debug", "underflow_overflow", "--debug", "--max_steps", "2"])
    assert seen == ["--debug", "underflow_overflow", "--max_steps", "2"]
