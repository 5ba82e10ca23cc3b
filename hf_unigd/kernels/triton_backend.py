"""Triton on CUDA: one matrix product per block of slices, then one launch for the local kernel and the recursion."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import eager
from .problem import Problem, cancellation_threshold, ieee_products


# Sequences of y per group: one per thread of a warp.
LANES = 32
# Cells (pairs of slices) per block: 256 MB in float32, and three times that in a backward.
BLOCK_CELLS = 1 << 26


def is_available(device: torch.device) -> bool:
    """Returns whether Triton is installed and runs on the device. Its interpreter runs on every device.

    AMD devices, which torch also calls "cuda", are not supported: the kernels contain NVIDIA instructions.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    nvidia = device.type == "cuda" and torch.version.hip is None
    return (nvidia or interpreted) and importlib.util.find_spec("triton") is not None


@functools.cache
def _kernels() -> Any:
    from . import triton_kernels

    return triton_kernels


class _Lanes:
    """The slices of y in groups of LANES sequences. Slices j of all sequences of a group are adjacent."""

    def __init__(self, problem: Problem) -> None:
        y = problem.other
        self.count = -(-len(y) // LANES)
        self.lengths = torch.ones(self.count * LANES, dtype=torch.int64)
        self.lengths[: len(y)] = y.lengths
        widths = self.lengths.view(-1, LANES).amax(1)
        self.offsets = torch.zeros(self.count + 1, dtype=torch.int64)
        torch.cumsum(widths * LANES, 0, out=self.offsets[1:])
        starts = torch.zeros_like(self.lengths)
        starts[: len(y)] = y.offsets[:-1]
        rows = []
        for group, width in enumerate(widths.tolist()):
            lanes = slice(group * LANES, (group + 1) * LANES)
            steps = torch.arange(width)[:, None]
            rows.append((starts[lanes] + torch.minimum(steps, self.lengths[lanes] - 1)).flatten())
        # Padding repeats the last slice of a sequence. Its cells cannot reach a result.
        self.rows = torch.cat(rows).to(y.slices.device)


@dataclass
class _Block:
    """Sequences [i, i_end) of x against groups [g, g_end) of lanes."""

    problem: Problem
    lanes: _Lanes
    i: int
    i_end: int
    g: int
    g_end: int

    def __post_init__(self) -> None:
        x, device = self.problem.x, self.problem.x.slices.device
        self.rows = slice(int(x.offsets[self.i]), int(x.offsets[self.i_end]))
        self.columns = self.lanes.rows[int(self.lanes.offsets[self.g]) : int(self.lanes.offsets[self.g_end])]
        self.offsets = (x.offsets[self.i : self.i_end + 1] - self.rows.start).to(device)
        self.groups = (self.lanes.offsets[self.g : self.g_end + 1] - self.lanes.offsets[self.g]).to(device)
        self.lengths = self.lanes.lengths[self.g * LANES : self.g_end * LANES].to(device)
        dtype = x.slices.dtype
        scale = torch.full((1,), self.problem.scale, dtype=dtype, device=device)
        self.arguments = (self.offsets, self.groups, self.lengths, scale, len(self.columns))
        self.constants = {
            "W": LANES,
            "GAUSSIAN": self.problem.local == "gaussian",
            "PER_PAIR": self.problem.per_pair_bandwidth,
            "FAST": dtype == torch.float32 and device.type == "cuda",
        }
        self.grid = (self.i_end - self.i, self.g_end - self.g)

    def _comparisons(self) -> Iterator[tuple[int, int, Tensor | None]]:
        x, y, device = self.problem.x, self.problem.other, self.columns.device
        if x.modalities is None or y.modalities is None:
            return self.problem.comparisons(None, None)
        return self.problem.comparisons(
            x.modalities[self.rows].to(device)[:, None], y.modalities.to(device)[self.columns]
        )

    @ieee_products()
    def squared_distances(self) -> Tensor:
        x, y = self.problem.x.slices[self.rows], self.problem.other.slices[self.columns]
        result = None
        for start, stop, mask in self._comparisons():
            a, b = x[:, start:stop], y[:, start:stop]
            norms = a.square().sum(1)[:, None] + b.square().sum(1)
            d2 = torch.addmm(norms, a, b.T, alpha=-2).clamp_(min=0)
            close = (d2 < cancellation_threshold(d2.dtype) * norms).nonzero()
            for cells in close.split(max(1, BLOCK_CELLS // (8 * (stop - start)))):
                r, c = cells.unbind(1)
                d2[r, c] = (a[r] - b[c]).square().sum(1)
            result = d2 if result is None or mask is None else torch.where(mask, d2, result)
        assert result is not None
        return result

    def run_forward(self, cells: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
        """Returns log K `(sequences, lanes)`, and log alpha of all cells, or of the last row without `keep`."""
        shape = cells.shape if keep else (self.grid[0], cells.shape[1])
        alpha = cells.new_empty(shape, dtype=torch.float64)
        log_k = cells.new_empty(self.grid[0], len(self.lengths), dtype=torch.float64)
        _kernels().forward_kernel[self.grid](
            cells, alpha, log_k, *self.arguments, **self.constants, KEEP=keep, num_warps=1
        )
        return log_k, alpha

    def run_backward(self, cells: Tensor, alpha: Tensor, log_k: Tensor, grad: Tensor) -> float:
        """Overwrites `cells` with dL/d(squared distance) and returns dL/dlog c."""
        below = cells.new_empty(self.grid[0], cells.shape[1], dtype=torch.float64)
        by_scale = torch.empty_like(log_k)
        _kernels().backward_kernel[self.grid](
            cells, alpha, below, log_k, grad, by_scale, *self.arguments, **self.constants, num_warps=1
        )
        return by_scale.sum(dtype=torch.float64).item()

    @ieee_products()
    def add_gradient(self, v: Tensor, dx: Tensor, dy: Tensor) -> None:
        x, y = self.problem.x.slices[self.rows], self.problem.other.slices[self.columns]
        to_y = torch.zeros_like(y)
        for start, stop, mask in self._comparisons():
            w = v if mask is None else v * mask
            a, b = x[:, start:stop], y[:, start:stop]
            dx[self.rows, start:stop] += 2 * (w.sum(1, keepdim=True) * a - w @ b)
            to_y[:, start:stop] += 2 * (w.sum(0)[:, None] * b - w.T @ a)
        dy.index_add_(0, self.columns, to_y)


def _blocks(problem: Problem) -> Iterator[_Block]:
    x, lanes = problem.x, _Lanes(problem)
    i = 0
    while i < len(x):
        g = i // LANES if problem.symmetric else 0
        columns = lanes.offsets[-1] - lanes.offsets[g]
        most = max(int(x.lengths[i]), BLOCK_CELLS // int(columns))
        i_end = int(torch.searchsorted(x.offsets, x.offsets[i] + most, right=True)) - 1
        rows = int(x.offsets[i_end] - x.offsets[i])
        while g < lanes.count:
            most = int(lanes.offsets[g]) + BLOCK_CELLS // rows
            g_end = max(g + 1, int(torch.searchsorted(lanes.offsets, most, right=True)) - 1)
            yield _Block(problem, lanes, i, i_end, g, g_end)
            g = g_end
        i = i_end


def forward(problem: Problem) -> Tensor:
    if problem.pairs is not None:
        return eager.forward(problem)
    result = problem.x.slices.new_empty(len(problem.x), len(problem.other))
    for block in _blocks(problem):
        log_k, _ = block.run_forward(block.squared_distances(), keep=False)
        columns = slice(block.g * LANES, min(block.g_end * LANES, len(problem.other)))
        result[block.i : block.i_end, columns] = log_k[:, : columns.stop - columns.start]
    return result.triu() + result.triu(1).T if problem.symmetric else result


def backward(problem: Problem, grad: Tensor) -> tuple[Tensor, Tensor | None, float]:
    if problem.pairs is not None:
        return eager.backward(problem, grad)
    if problem.symmetric:  # each pair is processed once, with the sum of the gradients of its two entries
        grad = torch.triu(grad + grad.T) - torch.diag(grad.diagonal())
    dx = torch.zeros_like(problem.x.slices)
    dy = dx if problem.y is None else torch.zeros_like(problem.y.slices)
    by_log_scale = 0.0
    for block in _blocks(problem):
        cells = block.squared_distances()
        log_k, alpha = block.run_forward(cells, keep=True)
        weights = torch.zeros_like(log_k, dtype=cells.dtype)
        columns = slice(block.g * LANES, min(block.g_end * LANES, len(problem.other)))
        weights[:, : columns.stop - columns.start] = grad[block.i : block.i_end, columns]
        by_log_scale += block.run_backward(cells, alpha, log_k, weights)
        block.add_gradient(cells, dx, dy)
    return dx, None if problem.y is None else dy, -2 * by_log_scale / problem.bandwidth
