"""The rules by which negatives are chosen among the entries closest to a row's anchor."""

import random
from dataclasses import dataclass

import numpy as np


# The rules that refuse candidates, in the order in which they are applied.
RULES = ("absolute_margin", "relative_margin", "max_score", "min_score")
STRATEGIES = ("top", "random")
_CANDIDATES_PER_NEGATIVE = 10


@dataclass(frozen=True)
class NegativeRules:
    """
    Those of sentence-transformers' `mine_hard_negatives`, under its names. They apply to the candidates of a row:
    entries that may be its negatives and are no duplicates, by falling similarity to the anchor.

    Attributes:
        num_negatives: How many negatives a row gets.
        range_min: How many of the closest candidates that pass the other rules are left out.
        range_max: How many of the closest candidates are looked at. By default `range_min + num_negatives`, and ten
            times as many negatives if a rule may refuse some, or if they are drawn.
        max_score: The highest similarity to the anchor.
        min_score: The lowest similarity to the anchor.
        absolute_margin: How much less similar to the anchor than the positive a negative is at least.
        relative_margin: The same, as a share of the absolute value of the positive's similarity.
        sampling_strategy: `"top"` takes the closest that are left, `"random"` draws among them.
        seed: Seed of what is drawn, which also depends on the number of the row alone.

    Raises:
        ValueError: a setting is out of range, or fewer candidates are looked at than negatives are wanted.
    """

    num_negatives: int = 3
    range_min: int = 0
    range_max: int | None = None
    max_score: float | None = None
    min_score: float | None = None
    absolute_margin: float | None = None
    relative_margin: float | None = None
    sampling_strategy: str = "top"
    seed: int = 0

    def __post_init__(self):
        if self.num_negatives < 1:
            raise ValueError(f"`num_negatives={self.num_negatives}` must be at least 1.")
        if self.range_min < 0:
            raise ValueError(f"`range_min={self.range_min}` must be at least 0.")
        if self.sampling_strategy not in STRATEGIES:
            raise ValueError(f"`sampling_strategy` must be top or random, got {self.sampling_strategy!r}.")
        if self.candidates - self.range_min < self.num_negatives:
            raise ValueError(
                f"`range_max={self.range_max}` leaves {max(self.candidates - self.range_min, 0)} candidates after "
                f"`range_min={self.range_min}`, which are not enough for `num_negatives={self.num_negatives}`. Raise "
                "`range_max`, or lower one of the others."
            )

    @property
    def candidates(self) -> int:
        """How many of the closest candidates are looked at."""
        if self.range_max is not None:
            return self.range_max
        # `min_score` refuses the last of them, behind which there are only worse ones.
        may_refuse = any(each is not None for each in (self.absolute_margin, self.relative_margin, self.max_score))
        needs_more = may_refuse or self.sampling_strategy == "random"
        return self.range_min + self.num_negatives * (_CANDIDATES_PER_NEGATIVE if needs_more else 1)

    def choose(self, scores: np.ndarray, positive_score: float, row: int) -> tuple[list[int], dict[str, int]]:
        """
        Args:
            scores (`np.ndarray` of shape `(n,)`): Similarities of the candidates to the anchor, falling.
            positive_score: That of the positive.
            row: Number of the row.

        Returns:
            Places of the negatives, by falling similarity, fewer than `num_negatives` if there are not enough; and how
            many candidates each of `RULES` has refused that none before it has.
        """
        scores = scores[: self.candidates].astype(np.float64)
        left = np.ones(len(scores), bool)
        skipped = {}
        for name, refused in self._refusals(scores, positive_score).items():
            skipped[name] = int((left & refused).sum())
            left &= ~refused
        places = np.flatnonzero(left)[self.range_min :].tolist()
        if self.sampling_strategy == "random" and len(places) > self.num_negatives:
            places = sorted(random.Random(f"{self.seed}-{row}").sample(places, self.num_negatives))
        return places[: self.num_negatives], skipped

    def _refusals(self, scores: np.ndarray, positive: float) -> dict[str, np.ndarray]:
        refused = {name: np.zeros(len(scores), bool) for name in RULES}
        if self.absolute_margin is not None:
            refused["absolute_margin"] = scores + self.absolute_margin > positive
        if self.relative_margin is not None:
            refused["relative_margin"] = scores > positive - abs(positive) * self.relative_margin
        if self.max_score is not None:
            refused["max_score"] = scores > self.max_score
        if self.min_score is not None:
            refused["min_score"] = scores < self.min_score
        return refused
