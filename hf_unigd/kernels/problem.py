"""What every backend is given: sequences packed and sorted by length, the local kernel, the pairs to align."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


LOCAL_KERNELS = ("gaussian", "plain_gaussian")

# (modality of x, modality of y) -> the columns [start, stop) of the features in which the two are compared.
Space = tuple[int, int, int, int]


@dataclass(frozen=True)
class Sequences:
    """Variable-length sequences, longest first, slices packed one sequence after the other.

    Attributes:
        slices: `(total, d)`, contiguous, in the dtype of the computation.
        offsets: `(n + 1,)` int64 on the CPU; sequence i is `slices[offsets[i]:offsets[i + 1]]`.
        order: `(n,)` int64 on the CPU; sequence i here is sequence `order[i]` of the caller.
        rows: `(total,)` int64 on the device of `slices`; where each slice lies in the caller's flattened tensor.
        modalities: `(total,)` int32 on the CPU, or None where there is one space only.
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
    """One call: the Gram matrix of `x` with `y` (with itself where `y` is None), or the given `pairs` of them.

    `pairs` is `(p, 2)` int64 on the CPU and counts in the order of the packed sequences. `bfloat16`: the values of the
    slices are bfloat16's, whatever their dtype.
    """

    x: Sequences
    y: Sequences | None
    pairs: Tensor | None
    bandwidth: float
    per_pair_bandwidth: bool
    local: str
    modality_columns: tuple[Space, ...]
    bfloat16: bool = False

    @property
    def other(self) -> Sequences:
        return self.x if self.y is None else self.y

    @property
    def symmetric(self) -> bool:
        return self.y is None and self.pairs is None

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The distinct column ranges, in a fixed order."""
        return sorted({(start, stop) for _, _, start, stop in self.modality_columns})

    def comparisons(self, p: Tensor | None, q: Tensor | None) -> Iterator[tuple[int, int, Tensor | None]]:
        """Column ranges with a mask of the cells compared in them (None: all), from the modalities of both sides,
        shaped to broadcast over the cells."""
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
        most = largest(self.x.slices.dtype)
        return min(0.5 / self.bandwidth / self.bandwidth, most) if self.bandwidth > 1e-150 else most

    def inverse_scale(self, x_lengths: Tensor, y_lengths: Tensor) -> Tensor:
        """c of u = c d^2 for pairs of these lengths: the scale; over (n + m) / 2 where the bandwidth is per pair."""
        lengths = (x_lengths + y_lengths).to(torch.float64)
        return self.scale * 2 / lengths if self.per_pair_bandwidth else torch.full_like(lengths, self.scale)


@contextmanager
def ieee_products() -> Iterator[None]:
    """Float32 matrix products on CUDA in float32, whatever the caller allows: TF32's 10 bits would lose distances."""
    matmul = torch.backends.cuda.matmul
    # Torch before 2.9 has the older switch only; later ones refuse a mix of both.
    name, value = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    before = getattr(matmul, name)
    setattr(matmul, name, value)
    try:
        yield
    finally:
        setattr(matmul, name, before)


def largest(dtype: torch.dtype) -> float:
    """The cap on u and c. Sums of 4,096 such terms along a path stay finite."""
    return 1e290 if dtype == torch.float64 else 1e30


def cancellation(dtype: torch.dtype) -> float:
    """Below this share of |x|^2 + |y|^2 a distance from the expanded square has lost its digits: take it directly."""
    return 1e-3 if dtype == torch.float64 else 2e-2


def log_local_kernel(u: Tensor, local: str) -> Tensor:
    """log kappa of u = |a - b|^2 / (2 sigma^2).

    "gaussian": kappa = k / (2 - k) with k = exp(-u) (Cuturi 2011, section 4; Sugar, section 3.2), which makes the
    alignment kernel positive definite. "plain_gaussian": kappa = k, whose alignment kernel is exp(-softDTW / gamma)
    with gamma = 2 sigma^2 (Cuturi and Blondel 2017, equation 1).
    """
    return -u - torch.log(2 - torch.exp(-u)) if local == "gaussian" else -u


def log_local_kernel_slope(log_kappa: Tensor, local: str) -> Tensor:
    """The derivative of log kappa by u, from log kappa itself: -(1 + kappa), or -1."""
    return -1 - log_kappa.exp() if local == "gaussian" else -torch.ones_like(log_kappa)
