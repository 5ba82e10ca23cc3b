"""Means over seeds, and when two of them differ."""

from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True)
class Sample:
    """
    What an arm scores with each seed.

    Attributes:
        values: A value for each seed.
        is_random: Whether a seed changes anything. If not, there is one value.
    """

    values: tuple[float, ...]
    is_random: bool = True

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def spread(self) -> float | None:
        """The largest value minus the smallest; None if there is one seed of several."""
        if self.is_random and len(self.values) < 2:
            return None
        return max(self.values) - min(self.values)

    def difference(self, other: "Sample") -> float | None:
        """The mean minus that of another arm; None if a spread is not known, or is as large as the difference."""
        spreads = (self.spread, other.spread)
        difference = self.mean - other.mean
        known = [each for each in spreads if each is not None]
        return difference if len(known) == 2 and abs(difference) > max(known) else None
