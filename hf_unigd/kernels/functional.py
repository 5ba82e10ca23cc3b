"""The public functions. Each takes packed features `(total_slices, d)` with offsets, or padded features `(n, L, d)`
with lengths, and returns torch tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import eager, ops, reference, validation
from .packing import COMPUTE_DTYPE
from .problem import LOCAL_KERNELS


NORMALIZATIONS = ("none", "cosine", "length", "content")
ModalityColumns = Mapping[tuple[int, int], tuple[int, int]]


class _Inputs:
    """The arguments that all functions share, checked and converted to what the operators take."""

    def __init__(
        self,
        x: Tensor,
        x_offsets: Tensor | None,
        y: Tensor | None,
        y_offsets: Tensor | None,
        x_lengths: Tensor | None,
        y_lengths: Tensor | None,
        pairs: Tensor | None,
        modality_columns: ModalityColumns | None,
        x_modalities: Tensor | None,
        y_modalities: Tensor | None,
    ) -> None:
        if y is None and (y_offsets is not None or y_lengths is not None or y_modalities is not None):
            raise ValueError("`y_offsets`, `y_lengths` and `y_modalities` describe `y`, but `y` is None.")
        self.x, self.x_extents = x, validation.features(x, x_offsets, x_lengths, "x")
        self.y, self.y_extents = y, None if y is None else validation.features(y, y_offsets, y_lengths, "y")
        if y is not None:
            validation.same_kind(x, y)
        validation.index_pairs(pairs)
        self.pairs = pairs
        self.x_modalities, self.y_modalities = x_modalities, y_modalities
        self.modality_columns = validation.flat_modality_columns(modality_columns, x, x_modalities, y, y_modalities)

    @property
    def x_lengths(self) -> Tensor:
        return self.x_extents.diff() if self.x.dim() == 2 else self.x_extents

    @property
    def y_lengths(self) -> Tensor:
        if self.y is None or self.y_extents is None:
            return self.x_lengths
        return self.y_extents.diff() if self.y.dim() == 2 else self.y_extents

    def broadcast_to_result(self, x_values: Tensor, y_values: Tensor) -> tuple[Tensor, Tensor]:
        """Reshapes per-sequence values of both sides so that they broadcast to the result, `(n, m)` or `(p,)`."""
        if self.pairs is None:
            return x_values[:, None], y_values[None]
        index = self.pairs.to(x_values.device)
        return x_values[index[:, 0]], y_values[index[:, 1]]

    def bandwidth(self, value: float | Tensor | str) -> Tensor:
        if not isinstance(value, str):
            return validation.positive(value, "bandwidth", self.x.device)
        validation.choice(value, "bandwidth", ("median",))
        return ops.median_bandwidth(self.x.detach(), self.x_extents, self.x_modalities, self.modality_columns)

    def log_kernel(self, *settings: Any) -> Tensor:
        return ops.alignment(
            self.x, self.x_extents, self.x_modalities, self.y, self.y_extents, self.y_modalities, self.pairs, *settings
        )

    def self_log_kernels(self, *settings: Any) -> tuple[Tensor, Tensor]:
        """Returns log K(x, x) of every sequence of both sides, `(n,)` and `(m,)`."""

        def diagonal(features: Tensor, extents: Tensor, modalities: Tensor | None) -> Tensor:
            n = extents.shape[0] - (1 if features.dim() == 2 else 0)
            index = torch.arange(n)[:, None].expand(n, 2)
            return ops.alignment(features, extents, modalities, None, None, None, index, *settings)

        x_self = diagonal(self.x, self.x_extents, self.x_modalities)
        if self.y is None or self.y_extents is None:
            return x_self, x_self
        return x_self, diagonal(self.y, self.y_extents, self.y_modalities)

    def subtract_self_kernels(self, log_k: Tensor, *settings: Any) -> Tensor:
        """Returns log K(x, y) - (log K(x, x) + log K(y, y)) / 2."""
        if self.y is None and self.pairs is None:
            x_self = y_self = log_k.diagonal()
        else:
            x_self, y_self = self.self_log_kernels(*settings)
        x_self, y_self = self.broadcast_to_result(x_self, y_self)
        return log_k - (x_self + y_self) / 2


def alignment_kernel(
    x: Tensor,
    x_offsets: Tensor | None = None,
    y: Tensor | None = None,
    y_offsets: Tensor | None = None,
    *,
    bandwidth: float | Tensor | str,
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
    pairs: Tensor | None = None,
    normalize: str = "cosine",
    local: str = "gaussian",
    per_pair_bandwidth: bool = False,
    modality_columns: ModalityColumns | None = None,
    x_modalities: Tensor | None = None,
    y_modalities: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Computes the logarithm of the global alignment kernel between sequences of feature vectors.

    `K(x, y) = sum over alignments pi of prod_i kappa(x_pi1(i), y_pi2(i))`. The sum is over all ways to walk through
    both sequences in steps of one. Each alignment is weighted by the local kernel of the slices that it pairs (Cuturi,
    Vert, Birkenes and Matsui 2007, equation 3; Cuturi 2011, section 3; Sugar, arXiv 2411.00304, equation 2). The cost
    is that of one matrix product of all slices.

    Args:
        x: `(total_slices, d)` packed or `(n, L, d)` padded features in float64, float32, bfloat16 or float16.
        x_offsets: `(n + 1,)` int, for packed `x`: sequence i is `x[x_offsets[i]:x_offsets[i + 1]]`. For features on a
            GPU, offsets and lengths on the CPU save a synchronisation.
        y, y_offsets: The other side. Without it, `x` is compared with itself, at half the cost.
        bandwidth: sigma of the local kernel, in the units of the features' distances. A number, a scalar tensor,
            which receives a gradient, or `"median"`: the median distance times sqrt(median length) (Cuturi 2011,
            section 5), estimated from `x` and detached.
        x_lengths, y_lengths: `(n,)`, `(m,)` int, for padded features. By default all sequences have length L. The
            values in the padding are ignored.
        pairs: `(p, 2)` int. Only these pairs (i of x, j of y, or j of x if `y` is None) are aligned.
        normalize: See Returns.
        local: `"gaussian"`, kappa = k / (2 - k) with k = exp(-|a - b|^2 / 2 sigma^2), or `"plain_gaussian"`,
            kappa = k, whose log K is -softDTW / gamma with gamma = 2 sigma^2.
        per_pair_bandwidth: Multiply sigma by sqrt((n + m) / 2), where n and m are the lengths of the pair (Sugar,
            section 3.2, where `bandwidth` is called delta).
        modality_columns: The Triple Kernel (Sugar, section 3.3, equation 4) in general form: maps each pair of
            modalities, in either order, to the columns `(start, stop)` in which their slices are compared. Sugar's
            mapping, with modality 0 for images, 1 for text and features [DINOv2 or BGE | CLIP] of 768 columns each,
            is `{(0, 0): (0, 768), (1, 1): (0, 768), (0, 1): (768, 1536)}`.
        x_modalities, y_modalities: `(total_slices,)` or `(n, L)` int, the modality of each slice. Required with
            `modality_columns`.
        backend: `"auto"`, `"reference"`, `"eager"`, `"compiled"` (C++ on the CPU, built at first use) or `"triton"`.

    Returns:
        `(n, m)`, or `(p,)` with `pairs`, in float64 for float64 features, else float32. With `L~ = log K(x, y) -
        (log K(x, x) + log K(y, y)) / 2` and D the number of alignments (K for kappa = 1), `normalize` gives:

        - `"none"`: log K.
        - `"cosine"`: L~, which is 0 for a sequence with itself.
        - `"length"`: L~ / ((n + m) / 2), per step.
        - `"content"`: L~ minus the same expression for log D. This removes what the two lengths alone explain, which
          is over 99 per cent of L~ at the textbook bandwidth. Use it for contrastive logits.

        exp of `"none"` and `"cosine"` is positive definite for `local="gaussian"` with one column range and one
        bandwidth for all pairs. It is not guaranteed to be for several column ranges (the Triple Kernel),
        `"plain_gaussian"`, a bandwidth per pair, `"length"` or `"content"`. log K itself is not guaranteed to be
        positive definite or conditionally positive definite.

    Raises:
        ValueError: An argument is invalid. The message names it, what was given and what is needed.
    """
    inputs = _Inputs(
        x, x_offsets, y, y_offsets, x_lengths, y_lengths, pairs, modality_columns, x_modalities, y_modalities
    )
    validation.choice(normalize, "normalize", NORMALIZATIONS)
    validation.choice(local, "local", LOCAL_KERNELS)
    validation.choice(backend, "backend", ("auto", *ops.BACKENDS))
    settings = (inputs.bandwidth(bandwidth), inputs.modality_columns, local, per_pair_bandwidth, backend)
    log_k = inputs.log_kernel(*settings)
    if normalize == "none":
        return log_k
    log_k = inputs.subtract_self_kernels(log_k, *settings)
    n, m = inputs.broadcast_to_result(inputs.x_lengths, inputs.y_lengths)
    if normalize == "length":
        return log_k / ((n + m) / 2).to(log_k)
    if normalize == "content":
        count = ops.log_path_count(n, m) - (ops.log_path_count(n, n) + ops.log_path_count(m, m)) / 2
        return log_k - count.to(log_k)
    return log_k


def soft_dtw(
    x: Tensor,
    x_offsets: Tensor | None = None,
    y: Tensor | None = None,
    y_offsets: Tensor | None = None,
    *,
    gamma: float | Tensor = 1.0,
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
    pairs: Tensor | None = None,
    divergence: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Computes soft dynamic time warping with squared Euclidean costs (Cuturi and Blondel 2017, equation 1).

    `softDTW = -gamma log sum_pi exp(-cost(pi) / gamma)`, in the units of the cost. This is -gamma log K of
    `alignment_kernel` with `local="plain_gaussian"`, so it is as fast and takes the same inputs. Gradients flow to x,
    y and gamma.

    Args:
        gamma: Smoothing, in the units of squared distances. As it approaches 0, the result approaches DTW.
        divergence: Subtract the mean of the two self-alignments (Blondel, Mensch and Vert 2021, equation 8). The
            result is then zero for equal sequences and never negative.

    Returns:
        `(n, m)`, or `(p,)` with `pairs`, in float64 for float64 features, else float32.

    Raises:
        ValueError: As in `alignment_kernel`.
    """
    inputs = _Inputs(x, x_offsets, y, y_offsets, x_lengths, y_lengths, pairs, None, None, None)
    validation.choice(backend, "backend", ("auto", *ops.BACKENDS))
    scale = validation.positive(gamma, "gamma", x.device)
    settings = ((scale / 2).sqrt(), inputs.modality_columns, "plain_gaussian", False, backend)
    log_k = inputs.log_kernel(*settings)
    if divergence:
        log_k = inputs.subtract_self_kernels(log_k, *settings)
    return -scale.to(log_k.dtype) * log_k


@torch.no_grad()
def alignment_posterior(
    x: Tensor,
    x_offsets: Tensor | None = None,
    y: Tensor | None = None,
    y_offsets: Tensor | None = None,
    *,
    bandwidth: float | Tensor | str,
    pairs: Tensor | None = None,
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
    local: str = "gaussian",
    per_pair_bandwidth: bool = False,
    modality_columns: ModalityColumns | None = None,
    x_modalities: Tensor | None = None,
    y_modalities: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Computes how often an alignment, drawn with the kernel's weights, passes through each pair of slices.

    `E[k, i, j]` is the derivative of log K by log kappa(x_i, y_j): the sum over the alignments through (i, j), divided
    by the sum over all alignments. It lies in [0, 1] and is 1 at both corners, and every row and column of a pair sums
    to at least 1. It is meant for explanation: no gradient flows through it, and it causes a graph break in
    `torch.compile`. The other arguments and the errors are those of `alignment_kernel`.

    Args:
        pairs: `(p, 2)` int. The default is the single pair (0, 0), or (0, 1) if `y` is None.
        backend: `"auto"`, `"eager"` or `"reference"`. The compiled backends have no posterior and use eager's.

    Returns:
        `(p, n_max, m_max)`, in float64 for float64 features, else float32. It is zero beyond each pair's lengths.
    """
    if pairs is None:
        pairs = torch.tensor([[0, 1 if y is None else 0]])
    inputs = _Inputs(
        x, x_offsets, y, y_offsets, x_lengths, y_lengths, pairs, modality_columns, x_modalities, y_modalities
    )
    validation.choice(local, "local", LOCAL_KERNELS)
    validation.choice(backend, "backend", ("auto", *ops.BACKENDS))
    problem, _ = ops.make_problem(
        x,
        inputs.x_extents,
        x_modalities,
        y,
        inputs.y_extents,
        y_modalities,
        pairs,
        inputs.bandwidth(bandwidth),
        inputs.modality_columns,
        local,
        per_pair_bandwidth,
    )
    implementation = reference if backend == "reference" else eager
    with torch.autocast(x.device.type, enabled=False):
        expected = implementation.posterior(problem).to(x.device, COMPUTE_DTYPE[x.dtype])
    lengths = inputs.broadcast_to_result(inputs.x_lengths, inputs.y_lengths)
    return expected[:, : int(lengths[0].max()), : int(lengths[1].max())]


def mean_slice_similarity(
    x: Tensor,
    x_offsets: Tensor | None = None,
    y: Tensor | None = None,
    y_offsets: Tensor | None = None,
    *,
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
    pairs: Tensor | None = None,
    modality_columns: ModalityColumns | None = None,
    x_modalities: Tensor | None = None,
    y_modalities: Tensor | None = None,
) -> Tensor:
    """Computes the mean cosine similarity of all slices of x with all slices of y, without alignment. This is the
    baseline of the ablation (Sugar, table 4b, "w/o GAK").

    The cost is linear in the number of slices, because the mean of all products is the product of the means. The
    function is differentiable in x and y. The arguments and the errors are those of `alignment_kernel`.

    Returns:
        `(n, m)`, or `(p,)` with `pairs`, in [-1, 1], in float64 for float64 features, else float32.
    """
    inputs = _Inputs(
        x, x_offsets, y, y_offsets, x_lengths, y_lengths, pairs, modality_columns, x_modalities, y_modalities
    )
    sides = (x, inputs.x_extents, x_modalities, y, inputs.y_extents, y_modalities)
    x_lengths = ops.check_inputs(
        *(None if side is None else side.detach() for side in sides), pairs, inputs.modality_columns
    )
    flat = inputs.modality_columns or [0, 0, 0, x.shape[-1]]
    result: Tensor | None = None
    with torch.autocast(x.device.type, enabled=False):
        for a, b, start, stop in (flat[i : i + 4] for i in range(0, len(flat), 4)):
            x_mean = _mean_direction(x, x_lengths, x_modalities, a, start, stop)
            if y is None:
                y_mean = _mean_direction(x, x_lengths, x_modalities, b, start, stop)
            else:
                y_mean = _mean_direction(y, inputs.y_lengths.to(y.device), y_modalities, b, start, stop)
            if pairs is None:
                part = x_mean @ y_mean.T
            else:
                index = pairs.to(x.device)
                part = (x_mean[index[:, 0]] * y_mean[index[:, 1]]).sum(-1)
            result = part if result is None else result + part
    assert result is not None
    return result


def _mean_direction(
    x: Tensor, lengths: Tensor, modalities: Tensor | None, modality: int, start: int, stop: int
) -> Tensor:
    """Returns, per sequence, the sum of its unit slices of one modality divided by its number of slices,
    `(n, stop - start)`."""
    slices = x[..., start:stop].to(COMPUTE_DTYPE[x.dtype])
    # Slices are masked before they are normalised, because a NaN in the padding would make its gradient NaN.
    if modalities is not None:
        slices = torch.where((modalities.to(x.device) == modality)[..., None], slices, 0)
    if x.dim() == 3:
        valid = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        slices = torch.where(valid[..., None], slices, 0)
        return F.normalize(slices, dim=-1).sum(1) / lengths[:, None]
    return torch.segment_reduce(F.normalize(slices, dim=-1), "mean", lengths=lengths, axis=0)
