"""What came of an attack: every case is right, a named refusal, or wrong."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol


@dataclass
class Outcomes:
    """Counts the cases of an attack.

    Attributes:
        title: What was attacked.
        right: Number of cases whose outcome is the right one.
        refused: Number of cases that ended in an error that names what is wrong.
        wrong: A line for each case of which neither is true.
    """

    title: str
    right: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return self.right + self.refused + len(self.wrong)

    def __str__(self) -> str:
        counts = f"{self.title}: {self.total:,} tried, {self.right:,} right, {self.refused:,} refused by name, "
        return "\n".join([f"{counts}{len(self.wrong):,} anything else", *(f"  {line}" for line in self.wrong)])


class Attack(Protocol):
    """What a module of attacks holds."""

    # The faults that the attack must see, by name: a context in which the code has the fault.
    PLANTED: dict[str, Callable[[], AbstractContextManager]]

    def run(self, bounded: bool) -> Outcomes:
        """Runs all cases, or if `bounded` a part of them that takes seconds and sees every planted fault."""
        ...
