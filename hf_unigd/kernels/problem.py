"""The input of every backend: sequences packed and sorted by length, the local kernel and the pairs to align."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


LOCAL_KERNELS = ("gaussian", "plain_gaussian")

# Modality of x, modality of y, start, stop: such slices are compared in the columns [start, stop) of the features.
ModalityEntry = tuple[int, int, int, int]


@dataclass(frozen=True)
class Sequences:
    """Variable-length sequences, longest first, with their slices concatenated.

    Attributes:
        slices: `(total, d)`, contiguous, in the dtype of the computation.
        offsets: `(n + 1,)` int64 on the CPU. Sequence i is `slices[offsets[i]:offsets[i + 1]]`.
        order: `(n,)` int64 on the CPU. Sequence i here is sequence `order[i]` of the caller.
        rows: `(total,)` int64 on the device of `slices`, the index of each slice in the caller's flattened tensor.
        modalities: `(total,)` int32 on the CPU, or None if all slices are compared in the same columns.
    """

    slices: Tensor
    offsets: Tensor
    order: Tensor
    rows: Tensor
    modalities: Tensor | None

    @property
    def lengths(self) -> Tensor:
        return self.offsets.diff()

    def __len__(self) -> int:
        return len(self.order)

    @property
    def rank(self) -> Tensor:
        """`(n,)`: sequence i of the caller is sequence `rank[i]` here."""
        return torch.argsort(self.order)

    def sequence(self, i: int) -> slice:
        return slice(int(self.offsets[i]), int(self.offsets[i + 1]))


@dataclass(frozen=True)
class Problem:
    """One call: the Gram matrix of `x` with `y` (with itself if `y` is None), or only the given `pairs` of it.

    `pairs` is `(p, 2)` int64 on the CPU and indexes the packed order of the sequences. `bfloat16` says that the slices
    hold bfloat16 values, whatever their dtype.
    """

    x: Sequences
    y: Sequences | None
    pairs: Tensor | None
    bandwidth: float
    per_pair_bandwidth: bool
    local: str
    modality_columns: tuple[ModalityEntry, ...]
    bfloat16: bool = False

    @property
    def other(self) -> Sequences:
        return self.x if self.y is None else self.y

    @property
    def symmetric(self) -> bool:
        return self.y is None and self.pairs is None

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The distinct column ranges, sorted."""
        return sorted({(start, stop) for _, _, start, stop in self.modality_columns})

    def comparisons(self, p: Tensor | None, q: Tensor | None) -> Iterator[tuple[int, int, Tensor | None]]:
        """Yields each column range with a mask of the cells compared in it (None for all cells).

        `p` and `q` are the modalities of both sides, shaped to broadcast over the cells.
        """
        if p is None or q is None:
            yield (*self.ranges[0], None)
            return
        for start, stop in self.ranges:
            mask = torch.zeros((), dtype=torch.bool, device=p.device)
            for s, t, *columns in self.modality_columns:
                if columns == [start, stop]:
                    mask = mask | ((p == s) & (q == t))
            yield start, stop, mask

    @property
    def scale(self) -> float:
        """1 / (2 sigma^2), clamped so that u = scale d^2 is finite for every finite distance."""
        most = cap(self.x.slices.dtype)
        return min(0.5 / self.bandwidth / self.bandwidth, most) if self.bandwidth > 1e-150 else most

    def inverse_scale(self, x_lengths: Tensor, y_lengths: Tensor) -> Tensor:
        """Returns c of u = c d^2 per pair: the scale, divided by (n + m) / 2 if the bandwidth is per pair."""
        lengths = (x_lengths + y_lengths).to(torch.float64)
        return self.scale * 2 / lengths if self.per_pair_bandwidth else torch.full_like(lengths, self.scale)


@contextmanager
def ieee_products() -> Iterator[None]:
    """Disables TF32 for float32 matrix products on CUDA. Its 10 bits are too few for distances."""
    matmul = torch.backends.cuda.matmul
    # Torch before 2.9 has only the older setting. Later versions raise if both are used.
    name, value = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    before = getattr(matmul, name)
    setattr(matmul, name, value)
    try:
        yield
    finally:
        setattr(matmul, name, before)


def cap(dtype: torch.dtype) -> float:
    """Returns the cap on u and c. Sums of 4,096 such terms along a path stay finite."""
    return 1e290 if dtype == torch.float64 else 1e30


def cancellation_threshold(dtype: torch.dtype) -> float:
    """Returns the fraction of |x|^2 + |y|^2 below which the expanded square of a distance loses too many digits. Such
    a distance is computed again from the difference."""
    return 1e-3 if dtype == torch.float64 else 2e-2


def log_local_kernel(u: Tensor, local: str) -> Tensor:
    """Returns log kappa for u = |a - b|^2 / (2 sigma^2).

    "gaussian": kappa = k / (2 - k) with k = exp(-u) (Cuturi 2011, section 4; Sugar, section 3.2), which makes the
    alignment kernel positive definite. "plain_gaussian": kappa = k, whose alignment kernel is exp(-softDTW / gamma)
    with gamma = 2 sigma^2 (Cuturi and Blondel 2017, equation 1).
    """
    return -u - torch.log(2 - torch.exp(-u)) if local == "gaussian" else -u


def log_local_kernel_slope(log_kappa: Tensor, local: str) -> Tensor:
    """Returns the derivative of log kappa by u, given log kappa: -(1 + kappa), or -1 for "plain_gaussian"."""
    return -1 - log_kappa.exp() if local == "gaussian" else -torch.ones_like(log_kappa)
