"""Scores of single items, whose mean is a metric."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np


@dataclass(frozen=True)
class Scores:
    """
    What a model scores on each item of a benchmark.

    Attributes:
        values (`np.ndarray` of shape `(n,)`, float64): The score of each item: 1 for a hit and 0 for a miss; for
            perplexity, the mean negative log-likelihood of a target's tokens, in nats.
        weights (`np.ndarray` of shape `(n,)`, float64): What each item counts in the mean; the number of a target's
            tokens, for instance. Equal by default.
        groups (`np.ndarray` of shape `(n,)`, int64): Items of one group, such as the captions of an image, are not
            independent. Each item is a group of its own by default.
        is_perplexity: Whether the metric is the exponential of the mean.
    """

    values: np.ndarray
    weights: np.ndarray | None = None
    groups: np.ndarray | None = None
    is_perplexity: bool = False

    @property
    def metric(self) -> float:
        """The mean, or its exponential."""
        mean = float(np.average(self.values, weights=self.weights))
        return math.exp(min(mean, 700.0)) if self.is_perplexity else mean

    def as_json(self) -> dict[str, Any]:
        """The scores as JSON can hold them: hits and misses as a string of ones and zeros."""
        is_binary = bool(np.isin(self.values, (0.0, 1.0)).all())
        values: Any = [round(float(value), 6) for value in self.values]
        if is_binary:
            values = "".join("1" if value else "0" for value in self.values)
        found: dict[str, Any] = {"values": values}
        if self.weights is not None:
            found["weights"] = self.weights.tolist()
        if self.groups is not None:
            found["groups"] = self.groups.tolist()
        return {**found, **({"is_perplexity": True} if self.is_perplexity else {})}

    @classmethod
    def of_json(cls, stored: Mapping[str, Any]) -> "Scores":
        """The scores that [`as_json`] made this of."""
        arrays = {
            name: np.array(stored[name], dtype) if name in stored else None
            for name, dtype in (("weights", np.float64), ("groups", np.int64))
        }
        values = stored["values"]
        return cls(
            np.array(list(values) if isinstance(values, str) else values, dtype=np.float64),
            **arrays,
            is_perplexity=stored.get("is_perplexity", False),
        )


# Of a protocol: scores by metric, or the metric itself where others measure it; and numbers of items.
Outcome: TypeAlias = tuple[Mapping[str, Scores | float], dict[str, int]]
