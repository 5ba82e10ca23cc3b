"""What the values of settings may be. A dataclass says it in the types of its fields."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Any, get_args, get_type_hints


@dataclass(frozen=True)
class AtLeast:
    """
    A finite number that is not below `least`.

    Attributes:
        least: The lowest value.
        exclusive: Whether the number must be above `least`.
    """

    least: float
    exclusive: bool = False

    def check(self, name: str, value: float) -> None:
        """
        Raises:
            ValueError: `value` is lower, infinite or not a number. The message names the setting.
        """
        if not math.isfinite(value) or value < self.least or (self.exclusive and value == self.least):
            relation = "above" if self.exclusive else "at least"
            raise ValueError(f"`{name}={value}` must be {relation} {self.least:g}.")


Positive = Annotated[int, AtLeast(1)]
NotNegative = Annotated[int, AtLeast(0)]


def check_positive(**settings: int | None) -> None:
    """
    Raises:
        ValueError: a setting is below 1. `None` stands for a setting that is not given.
    """
    check_least(SimpleNamespace(**settings), dict.fromkeys(settings, 1))


def check_least(settings: Any, least: Mapping[str, float]) -> None:
    """
    Checks fields that another library declares.

    Raises:
        ValueError: a value is below its least one. `None` stands for a setting that is not given.
    """
    for name, lowest in least.items():
        if (value := getattr(settings, name)) is not None:
            AtLeast(lowest).check(name, value)


def check_settings(settings: Any) -> None:
    """
    Checks the fields of a dataclass whose type is `Annotated` with something that has a method `check(name, value)`.
    `None` stands for a setting that is not given.

    Raises:
        ValueError: a value is not one that its field may have.
    """
    for name, hint in get_type_hints(type(settings), include_extras=True).items():
        value = getattr(settings, name)
        for part in (hint, *get_args(hint)):  # a union may contain it
            for constraint in getattr(part, "__metadata__", ()):
                if value is not None:
                    constraint.check(name, value)
