"""What an examination of a checkpoint finds, and how a check becomes a part of it that cannot fail."""

from collections.abc import Callable
from dataclasses import dataclass


OK, NOTE, FAULT = "ok", "note", "FAULT"


@dataclass(frozen=True)
class Finding:
    """One line of the report. Its `level` is `OK`, `NOTE` (worth knowing, but not wrong) or `FAULT`."""

    subject: str
    level: str
    text: str


def attempt(subject: str, check: Callable[..., list[Finding]], *args) -> list[Finding]:
    """What `check` finds. An error is a finding too, so that the rest is examined all the same."""
    try:
        return check(*args)
    except Exception as error:
        return [Finding(subject, FAULT, line(error))]


def line(error: Exception) -> str:
    """An error as one line of text, with its type if it says nothing or only a name."""
    text = " ".join(str(error).split())
    return text if " " in text else f"{type(error).__name__} {text}".rstrip()
