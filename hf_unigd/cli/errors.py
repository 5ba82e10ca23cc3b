"""How a command says what stopped it: one line."""

import re


_LONGEST = 600
# Errors of these types are raised with a message for people.
_EXPLAINED = (ValueError, OSError, ImportError, FloatingPointError, RuntimeError)
# torch puts the traceback of a data loader's worker into the message of its error.
_WORKER = re.compile(
    r"Caught \w+ in DataLoader worker process \d+\.\nOriginal Traceback .*\n(?:\w+\.)*(\w+: .*)", re.S
)


def one_line(error: Exception) -> str:
    """What an error says, on one line that is not too long to be read."""
    text = str(error)
    if worker := _WORKER.match(text):
        text = f"a data loader's worker stopped: {worker[1]}"
    is_explained = isinstance(error, _EXPLAINED) and bool(text)
    text = " ".join(text.split())
    is_whole = len(text) <= _LONGEST
    if not is_whole:
        text = f"{text[:_LONGEST].rstrip()} ..."
    kind = "" if is_explained else f"{type(error).__name__}{': ' if text else ''}"
    return f"{kind}{text}{'' if is_explained and is_whole else ' (`--debug` shows where)'}"
