"""Scores of items that come in categories, which count alike whatever their sizes."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from .benchmark_data import BenchmarkData
from .scores import Scores


def by_category(
    data: BenchmarkData, hits: Mapping[str, torch.Tensor], numbers: Sequence[int] | None = None
) -> dict[str, Scores]:
    """
    The scores of items, for each category and over categories that count alike. Without categories, of all items.

    Args:
        data: Its rows may have a `category`.
        hits: The score of each item by the name of the metric, each of shape `(n,)`.
        numbers: The rows of the items, if a row has several; they are one group.
    """
    of_rows = [row.get("category") for row in data.rows]
    rows = np.arange(len(of_rows)) if numbers is None else np.array(numbers)
    categories = [of_rows[number] for number in rows]
    found: dict[str, Scores] = {}
    for metric, each in hits.items():
        values = each.numpy().astype(np.float64)
        parts = {
            category: _part(values, rows, [place for place, own in enumerate(categories) if own == category])
            for category in dict.fromkeys(categories)
        }
        if None not in parts:
            found |= {f"{category}_{metric}": scores for category, scores in parts.items()}
        found[metric] = mean_of_means(list(parts.values()))
    return found


def mean_of_means(parts: list[Scores]) -> Scores:
    """Scores whose mean is that of the means of the parts, whatever their sizes."""
    if len(parts) == 1:
        return parts[0]
    groups, first = [], 0
    for part in parts:
        own = np.arange(len(part.values)) if part.groups is None else part.groups
        groups.append(own + first)
        first += int(own.max()) + 1
    return Scores(
        np.concatenate([part.values for part in parts]),
        np.concatenate([np.full(len(part.values), 1 / len(part.values)) for part in parts]),
        np.concatenate(groups),
    )


def _part(values: np.ndarray, rows: np.ndarray, places: list[int]) -> Scores:
    own = rows[places]
    return Scores(values[places], groups=own if len(set(own)) < len(own) else None)
