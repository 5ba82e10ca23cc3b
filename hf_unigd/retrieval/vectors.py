"""Search among vectors in memory."""

from collections.abc import Iterable, Iterator
from functools import cached_property

import numpy as np
import torch


_DTYPES = {"float32": np.float32, "float16": np.float16, "int8": np.int8, "binary": np.uint8}
PRECISIONS = tuple(_DTYPES)
# Of a unit vector that was rounded to float16 on its way.
_LENGTH_TOLERANCE = 1e-2
_ROWS_PER_PRODUCT = 16384


class VectorMatrix:
    """
    Vectors in memory, and the row ids of their entries. What is not a unit vector, such as one of NaNs, is left out.

    Args:
        batches: Row ids `(m,)` and float32 vectors `(m, width)`.
        count: Number of vectors.
        width: Size of a vector.
        precision: What the vectors are rounded to: `"float32"`, `"float16"`, `"int8"`, or `"binary"`, the signs.

    Attributes:
        row_ids (`np.ndarray` of shape `(n,)`): Of the vectors that were not left out.
        left_out: Number of the others.
    """

    def __init__(self, batches: Iterable[tuple[np.ndarray, np.ndarray]], count: int, width: int, precision: str):
        self.precision = precision
        rows = np.empty((count, *_rounded(np.zeros((1, width), np.float32), precision).shape[1:]), _DTYPES[precision])
        row_ids = np.empty(count, np.uint64)
        end = 0
        for batch_ids, vectors in batches:
            good = are_unit(vectors)
            start, end = end, end + int(good.sum())
            row_ids[start:end] = batch_ids[good]
            rows[start:end] = _rounded(vectors if good.all() else vectors[good], precision)
        self.row_ids, self._rows = row_ids[:end], rows[:end]
        self.left_out = count - end

    @staticmethod
    def bytes_needed(count: int, width: int, precision: str) -> int:
        """Memory of `count` vectors."""
        return count * width * {"float32": 32, "float16": 16, "int8": 8, "binary": 1}[precision] // 8

    def nearest(self, queries: np.ndarray, count: int, among: np.ndarray | None = None) -> list[np.ndarray]:
        """
        Row ids of the vectors with the largest inner products, best first, for each query.

        Args:
            queries (`np.ndarray` of shape `(n, width)`): Float32 unit vectors.
            count: How many to find.
            among: Row ids to choose from; None for all.
        """
        rows, row_ids = self._rows, self.row_ids
        if among is not None:
            chosen = np.isin(row_ids, among)
            rows, row_ids = rows[chosen], row_ids[chosen]
        scores, places = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.long)
        for start, chunk in self._scores(queries, rows):
            best, order = chunk.topk(min(count, chunk.shape[1]))
            scores, places = torch.cat([scores, best], 1), torch.cat([places, order + start], 1)
            scores, order = scores.topk(min(count, scores.shape[1]))
            places = places.gather(1, order)
        return list(row_ids[places.numpy()])

    def take(self, row_ids: np.ndarray) -> np.ndarray:
        """The vectors, as they are rounded, of entries that were not left out."""
        return self._rows[self._order[np.searchsorted(self.row_ids, row_ids, sorter=self._order)]]

    @cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(self.row_ids)

    def _scores(self, queries: np.ndarray, rows: np.ndarray) -> Iterator[tuple[int, torch.Tensor]]:
        """Scores `(n, m)` of the rows from a place on."""
        if self.precision == "binary":
            queries = _rounded(queries, "binary")
        query = torch.from_numpy(queries)
        # Memory that is allocated anew for each chunk would cost more than the product.
        buffer = torch.empty(min(len(rows), _ROWS_PER_PRODUCT), rows.shape[1])
        for start in range(0, len(rows), _ROWS_PER_PRODUCT):
            chunk = rows[start : start + _ROWS_PER_PRODUCT]
            if self.precision == "binary":
                differing = [np.bitwise_count(chunk ^ each).sum(1, dtype=np.int32) for each in queries]
                yield start, -torch.from_numpy(np.stack(differing)).float()
            elif self.precision == "float32":
                yield start, query @ torch.from_numpy(chunk).T
            else:
                yield start, query @ buffer[: len(chunk)].copy_(torch.from_numpy(chunk)).T


def are_unit(vectors: np.ndarray) -> np.ndarray:
    """Which of the vectors `(n, width)` have length 1, up to rounding."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.abs(np.einsum("nd,nd->n", vectors, vectors) - 1) < _LENGTH_TOLERANCE


def _rounded(vectors: np.ndarray, precision: str) -> np.ndarray:
    if precision == "binary":
        return np.packbits(vectors > 0, axis=1)
    if precision == "int8":
        # One scale a vector would change the order of the scores, and one for all wastes bits on a few large numbers.
        scale = 127 / 4 * np.sqrt(vectors.shape[1])  # four standard deviations of a unit vector's numbers
        return np.clip(np.rint(vectors * scale), -127, 127).astype(np.int8)
    return vectors.astype(precision, copy=False)
