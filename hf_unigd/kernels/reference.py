"""The recursion as in the papers, in float64, one cell at a time. It is slow and serves to test the other backends."""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import Problem, log_local_kernel, log_local_kernel_slope


def log_alpha(log_kappa: Tensor) -> Tensor:
    """Returns log M of one pair, `(n + 1, m + 1)`, given its `(n, m)` log local kernel:

        M[0, 0] = 1,  M[i, 0] = M[0, j] = 0,
        M[i, j] = (M[i - 1, j - 1] + M[i - 1, j] + M[i, j - 1]) kappa(x_i, y_j)

    (Cuturi 2011, section 3; the proof of Sugar's theorem 1). K(x, y) is M[n, m].
    """
    n, m = log_kappa.shape
    result = log_kappa.new_full((n + 1, m + 1), -torch.inf)
    result[0, 0] = 0
    for i in range(1, n + 1):
        for j in range(1, m + 1):
            before = torch.stack([result[i - 1, j - 1], result[i - 1, j], result[i, j - 1]])
            result[i, j] = torch.logsumexp(before, 0) + log_kappa[i - 1, j - 1]
    return result


def expected_alignment(log_kappa: Tensor) -> Tensor:
    """Returns the derivative of log K by log kappa, E[i, j] = M[i, j] beta[i, j] / K, `(n, m)`.

    beta[i, j] sums the alignments from (i, j) to the end, without the cell itself. It is M / kappa of the reversed
    sequences.
    """
    alpha = log_alpha(log_kappa)[1:, 1:]
    beta = log_alpha(log_kappa.flip(0, 1))[1:, 1:].flip(0, 1) - log_kappa
    return (alpha + beta - alpha[-1, -1]).exp()


def _columns(problem: Problem, i: int, j: int) -> Tensor:
    """Returns a bool mask `(n, m, d)` of the columns in which sequences i and j are compared (Sugar, equation 4)."""
    x, y = problem.x, problem.other
    n, m = int(x.lengths[i]), int(y.lengths[j])
    result = torch.zeros(n, m, x.slices.shape[1], dtype=torch.bool)
    for s, t, start, stop in problem.modality_columns:
        if x.modalities is None or y.modalities is None:
            meet = torch.ones(n, m, dtype=torch.bool)
        else:
            meet = (x.modalities[x.sequence(i), None] == s) & (y.modalities[None, y.sequence(j)] == t)
        result[..., start:stop] |= meet[..., None]
    return result


class _Pair:
    """The differences of the slices of sequences i and j, the scaled distances u and the log local kernel."""

    def __init__(self, problem: Problem, i: int, j: int) -> None:
        x, y = problem.x, problem.other
        a = x.slices[x.sequence(i)].to("cpu", torch.float64)
        b = y.slices[y.sequence(j)].to("cpu", torch.float64)
        self.difference = (a[:, None] - b[None]) * _columns(problem, i, j)
        self.inverse_scale = problem.inverse_scale(x.lengths[i], y.lengths[j]).item()
        self.u = self.difference.square().sum(-1) * self.inverse_scale
        self.log_kappa = log_local_kernel(self.u, problem.local)


def _all_pairs(problem: Problem) -> Tensor:
    if problem.pairs is not None:
        return problem.pairs
    return torch.cartesian_prod(torch.arange(len(problem.x)), torch.arange(len(problem.other)))


def forward(problem: Problem) -> Tensor:
    log_k = [log_alpha(_Pair(problem, i, j).log_kappa)[-1, -1] for i, j in _all_pairs(problem).tolist()]
    return torch.stack(log_k).view((len(problem.x), len(problem.other)) if problem.pairs is None else (-1,))


def backward(problem: Problem, grad: Tensor) -> tuple[Tensor, Tensor | None, float]:
    dx = torch.zeros_like(problem.x.slices, dtype=torch.float64, device="cpu")
    dy = dx if problem.y is None else torch.zeros_like(problem.y.slices, dtype=torch.float64, device="cpu")
    d_bandwidth = 0.0
    for (i, j), g in zip(_all_pairs(problem).tolist(), grad.flatten().tolist(), strict=True):
        pair = _Pair(problem, i, j)
        by_u = g * expected_alignment(pair.log_kappa) * log_local_kernel_slope(pair.log_kappa, problem.local)
        by_difference = 2 * pair.inverse_scale * by_u[..., None] * pair.difference
        dx[problem.x.sequence(i)] += by_difference.sum(1)
        dy[problem.other.sequence(j)] -= by_difference.sum(0)
        d_bandwidth += (by_u * pair.u).sum().item() * -2 / problem.bandwidth
    return dx, None if problem.y is None else dy, d_bandwidth


def posterior(problem: Problem) -> Tensor:
    """Returns the expected alignments, `(p, max n, max m)`, which are zero beyond each pair's lengths."""
    assert problem.pairs is not None
    size = int(problem.x.lengths.max()), int(problem.other.lengths.max())
    result = torch.zeros(len(problem.pairs), *size, dtype=torch.float64)
    for k, (i, j) in enumerate(problem.pairs.tolist()):
        expected = expected_alignment(_Pair(problem, i, j).log_kappa)
        result[k, : expected.shape[0], : expected.shape[1]] = expected
    return result
