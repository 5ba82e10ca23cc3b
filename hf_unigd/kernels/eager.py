"""Batched torch on any device: one matrix product per block of pairs, then the recursion in the log domain.

The backward is explicit. With alpha the recursion from the start and beta the recursion from the end,
`E[i, j] = alpha beta / K` is the expected number of times that an alignment passes through cell (i, j). It is also the
derivative of log K by log kappa(x_i, y_j). Blocks limit the memory: no tensor covers all pairs of slices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .problem import (
    Problem,
    Sequences,
    cancellation_threshold,
    cap,
    ieee_products,
    log_local_kernel,
    log_local_kernel_slope,
)


# Cells (pairs of slices) per block. The backward holds about eight tensors of this size.
BLOCK_CELLS = 1 << 21


@dataclass
class Block:
    """The pairs of one block: all sequences i of `x` with all j of `y`, or i[k] with j[k] if the pairs are given."""

    problem: Problem
    i: Tensor
    j: Tensor

    def __post_init__(self) -> None:
        x, y = self.problem.x, self.problem.other
        self.x_index, self.x_lengths = _padded(x, self.i)
        self.y_index, self.y_lengths = _padded(y, self.j)
        self.paired = self.problem.pairs is not None
        device = x.slices.device
        n, m = x.lengths[self.i], y.lengths[self.j]
        if not self.paired:
            n, m = n[:, None].expand(-1, len(m)), m[None].expand(len(n), -1)
        self.inverse_scale = self.problem.inverse_scale(n, m).to(device, x.slices.dtype)[..., None, None]
        self.pair_lengths = n.to(device).flatten(), m.to(device).flatten()

    def _outer(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Reshapes per-slice values `(n, L)` of both sides so that they broadcast over the block's cells."""
        return (x[:, :, None], y[:, None, :]) if self.paired else (x[:, None, :, None], y[None, :, None, :])

    def _comparisons(self) -> Iterator[tuple[int, int, Tensor | None]]:
        x, y = self.problem.x, self.problem.other
        if x.modalities is None or y.modalities is None:
            return self.problem.comparisons(None, None)
        device = x.slices.device
        modalities = self._outer(x.modalities.to(device)[self.x_index], y.modalities.to(device)[self.y_index])
        return self.problem.comparisons(*modalities)

    @ieee_products()
    def scaled_distances(self) -> Tensor:
        """Returns u = c d^2 for every cell of the block, `(..., Lx, Ly)`."""
        x, y = self.problem.x.slices[self.x_index], self.problem.other.slices[self.y_index]
        product = "pid,pjd->pij" if self.paired else "nid,mjd->nmij"
        result = None
        for start, stop, mask in self._comparisons():
            a, b = x[..., start:stop], y[..., start:stop]
            norms = sum(self._outer(a.square().sum(-1), b.square().sum(-1)))
            d2 = (norms - 2 * torch.einsum(product, a, b)).clamp_(min=0)
            close = (d2 < cancellation_threshold(d2.dtype) * norms).nonzero()
            for cells in close.split(max(1, BLOCK_CELLS // (stop - start))):
                k, (r, c) = cells.unbind(1), cells[:, -2:].unbind(1)
                d2[k] = (a[k[0], r] - b[k[0] if self.paired else k[1], c]).square().sum(-1)
            result = d2 if result is None or mask is None else torch.where(mask, d2, result)
        assert result is not None
        return (result * self.inverse_scale).clamp_(max=cap(result.dtype))

    @ieee_products()
    def add_gradient(self, v: Tensor, dx: Tensor, dy: Tensor) -> None:
        """Adds the gradients of both sides' slices, given `v`, the derivative by the squared distances."""
        x, y = self.problem.x.slices[self.x_index], self.problem.other.slices[self.y_index]
        to_x, to_y = ("pij,pjd->pid", "pij,pid->pjd") if self.paired else ("nmij,mjd->nid", "nmij,nid->mjd")
        x_sum, y_sum = ("pij->pi", "pij->pj") if self.paired else ("nmij->ni", "nmij->mj")
        gx, gy = torch.zeros_like(x), torch.zeros_like(y)
        for start, stop, mask in self._comparisons():
            w = v if mask is None else v * mask
            a, b = x[..., start:stop], y[..., start:stop]
            gx[..., start:stop] += 2 * (torch.einsum(x_sum, w)[..., None] * a - torch.einsum(to_x, w, b))
            gy[..., start:stop] += 2 * (torch.einsum(y_sum, w)[..., None] * b - torch.einsum(to_y, w, a))
        # Padding repeats the last slice of a sequence. Its `v` is zero, so it adds nothing.
        dx.index_add_(0, self.x_index.flatten(), gx.flatten(0, 1))
        dy.index_add_(0, self.y_index.flatten(), gy.flatten(0, 1))


def _padded(sequences: Sequences, index: Tensor) -> tuple[Tensor, Tensor]:
    """Returns `(n, L)` indices of packed slices, with the last one repeated as padding, and `(n,)` lengths."""
    lengths = sequences.lengths[index]
    steps = torch.arange(int(lengths.max()))[None]
    rows = sequences.offsets[index][:, None] + torch.minimum(steps, lengths[:, None] - 1)
    return rows.to(sequences.slices.device), lengths


def _blocks(problem: Problem) -> Iterator[tuple[Block, Tensor]]:
    """Yields blocks of at most BLOCK_CELLS cells that cover the problem, each with a mask of the pairs that count."""
    x, y = problem.x, problem.other
    if problem.pairs is not None:
        i, j = problem.pairs.unbind(1)
        size = max(1, BLOCK_CELLS // (int(x.lengths[i].max()) * int(y.lengths[j].max())))
        for a, b in zip(i.split(size), j.split(size), strict=True):
            yield Block(problem, a, b), torch.ones(len(a), dtype=torch.bool)
        return
    top = 0
    while top < len(x):
        longest = int(x.lengths[top])
        left = top if problem.symmetric else 0
        height = min(32, max(1, BLOCK_CELLS // (longest * int(y.lengths[left]))))
        rows = torch.arange(top, min(len(x), top + height))
        while left < len(y):
            width = max(1, BLOCK_CELLS // (height * longest * int(y.lengths[left])))
            columns = torch.arange(left, min(len(y), left + width))
            all_pairs = torch.ones(len(rows), len(columns), dtype=torch.bool)
            yield Block(problem, rows, columns), rows[:, None] <= columns if problem.symmetric else all_pairs
            left += width
        top += height


def _skew(cells: Tensor, outside: float) -> Tensor:
    """Rearranges `(B, n, m)` into anti-diagonals `(n + m - 1, n, B)`."""
    b, n, m = cells.shape
    steps = n + m - 1
    padded = F.pad(cells, (0, n), value=outside).reshape(b, n * (steps + 1))[:, : n * steps]
    return padded.view(b, n, steps).permute(2, 1, 0).contiguous()


def _unskew(diagonals: Tensor) -> Tensor:
    steps, n, b = diagonals.shape
    flat = F.pad(diagonals.permute(2, 1, 0).reshape(b, n * steps), (0, n))
    return flat.view(b, n, steps + 1)[:, :, : steps - n + 1]


def _log_sum_exp(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    top = torch.maximum(torch.maximum(a, b), c)
    total = (a - top).exp_().add_((b - top).exp_()).add_((c - top).exp_())
    return total.log_().add_(top)


class _Recursion:
    """Computes log alpha and log beta of a batch of pairs, one anti-diagonal at a time, in float64 (float32 on MPS).

    The posterior is exp(log alpha + log beta - log K). At small bandwidths these terms are of size 1e6 and more, where
    float32 rounds by about 1.

    Args:
        log_kappa: `(B, Lx, Ly)`.
        n, m: `(B,)` lengths of each pair. Cells beyond them cannot reach the result and may hold any value.
    """

    def __init__(self, log_kappa: Tensor, n: Tensor, m: Tensor) -> None:
        _, self.rows, self.columns = log_kappa.shape
        # Below every sum of capped terms, and finite, so that the difference of two such values is not NaN.
        wide = torch.float32 if log_kappa.device.type == "mps" else torch.float64
        self.log_zero = -1e37 if wide == torch.float32 else -1e300
        self.dtype = log_kappa.dtype
        self.log_kappa = _skew(log_kappa.to(wide), self.log_zero)
        self.steps = len(self.log_kappa)
        self.ends = n + m - 2, n - 1, torch.arange(len(n), device=n.device)
        # With one extra row above the first.
        alpha = self.log_kappa.new_full((self.steps, self.rows + 1, len(n)), self.log_zero)
        alpha[0, 1] = self.log_kappa[0, 0]
        start = torch.full_like(alpha[0], self.log_zero)
        for t in range(1, self.steps):
            first, last = self._valid(t)
            one, two = alpha[t - 1], alpha[t - 2] if t > 1 else start
            before = _log_sum_exp(one[first + 1 : last + 1], one[first:last], two[first:last])
            alpha[t, first + 1 : last + 1] = before.add_(self.log_kappa[t, first:last])
        self.log_alpha = alpha[:, 1:]
        self.log_k = self.log_alpha[self.ends]

    def _valid(self, t: int) -> tuple[int, int]:
        """Returns the range [first, last) of the rows that anti-diagonal t crosses."""
        return max(0, t - self.columns + 1), min(self.rows, t + 1)

    def expected_alignments(self) -> Tensor:
        """Returns alpha beta / K, `(B, Lx, Ly)`, in the dtype of `log_kappa`, zero beyond each pair's lengths."""
        end, row, batch = self.ends
        expected = torch.zeros_like(self.log_kappa, dtype=self.dtype)
        # kappa beta on the next two anti-diagonals, with one extra row at the end.
        one = self.log_kappa.new_full((self.rows + 1, len(batch)), self.log_zero)
        two = one.clone()
        for t in range(self.steps - 1, -1, -1):
            first, last = self._valid(t)
            beta = torch.full_like(one, self.log_zero)
            beta[first:last] = _log_sum_exp(one[first:last], one[first + 1 : last + 1], two[first + 1 : last + 1])
            here = end == t
            beta[row[here], batch[here]] = -self.log_k[here]
            expected[t, first:last] = (self.log_alpha[t, first:last] + beta[first:last]).clamp_(max=0).exp_()
            beta[first:last] += self.log_kappa[t, first:last]
            one, two = beta.clamp_(min=self.log_zero), one
        return _unskew(expected)


def forward(problem: Problem) -> Tensor:
    x, y = problem.x, problem.other
    shape = (len(x), len(y)) if problem.pairs is None else (len(problem.pairs),)
    result = x.slices.new_empty(shape)
    done = 0
    for block, counted in _blocks(problem):
        log_kappa = log_local_kernel(block.scaled_distances(), problem.local)
        log_k = _Recursion(log_kappa.flatten(0, -3), *block.pair_lengths).log_k.to(result)
        if problem.pairs is not None:
            result[done : done + len(log_k)] = log_k
            done += len(log_k)
            continue
        r, c = counted.nonzero(as_tuple=True)
        log_k = log_k.view(counted.shape)[r, c]
        result[block.i[r], block.j[c]] = log_k
        if problem.symmetric:
            result[block.j[c], block.i[r]] = log_k
    return result


def backward(problem: Problem, grad: Tensor) -> tuple[Tensor, Tensor | None, float]:
    dx = torch.zeros_like(problem.x.slices)
    dy = dx if problem.y is None else torch.zeros_like(problem.y.slices)
    by_log_scale = 0.0
    if problem.symmetric:  # each pair is processed once, with the sum of the gradients of its two entries
        grad = torch.triu(grad + grad.T) - torch.diag(grad.diagonal())
    done = 0
    for block, _ in _blocks(problem):
        u = block.scaled_distances()
        log_kappa = log_local_kernel(u, problem.local)
        recursion = _Recursion(log_kappa.flatten(0, -3), *block.pair_lengths)
        v = recursion.expected_alignments().view(u.shape)
        if problem.pairs is None:
            weight = grad[block.i[:, None], block.j[None]]
        else:
            weight = grad[done : done + len(block.i)]
            done += len(block.i)
        v *= weight.to(v)[..., None, None] * log_local_kernel_slope(log_kappa, problem.local)
        by_log_scale += (v * u).sum(dtype=torch.float64).item()
        block.add_gradient(v * block.inverse_scale, dx, dy)
    return dx, None if problem.y is None else dy, -2 * by_log_scale / problem.bandwidth


def posterior(problem: Problem) -> Tensor:
    assert problem.pairs is not None
    size = int(problem.x.lengths.max()), int(problem.other.lengths.max())
    parts = []
    for block, _ in _blocks(problem):
        log_kappa = log_local_kernel(block.scaled_distances(), problem.local)
        expected = _Recursion(log_kappa, *block.pair_lengths).expected_alignments()
        parts.append(F.pad(expected, (0, size[1] - expected.shape[2], 0, size[0] - expected.shape[1])))
    return torch.cat(parts)
