"""Inputs of the kernel tests, and independent implementations to compare the library with."""

import math

import torch

from hf_unigd.kernels import alignment_kernel, compiled


# Without a compiler, `auto` is eager.
FAST_BACKENDS = ["eager", "compiled"] if compiled.is_available() else ["eager"]


def packed(lengths, d, *, seed=0, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(lengths), d, generator=generator, dtype=torch.float64) * scale
    return x.to(dtype), offsets_of(lengths)


def offsets_of(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])


def sequences(x, offsets):
    return [x[a:b] for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]


def log_kappa(a, b, sigma, local="gaussian"):
    """An independent implementation from the paper, with distances computed from differences."""
    u = (a[:, None] - b[None]).square().sum(-1) / (2 * sigma**2)
    return -u - torch.log(2 - torch.exp(-u)) if local == "gaussian" else -u


def enumerate_alignments(matrix):
    """Returns the log of the sum over all alignments of the product of exp(matrix), and the number of alignments."""
    n, m = matrix.shape
    totals = []

    def walk(i, j, total):
        total += matrix[i, j].item()
        if (i, j) == (n - 1, m - 1):
            totals.append(total)
            return
        for a, b in ((i + 1, j), (i, j + 1), (i + 1, j + 1)):
            if a < n and b < m:
                walk(a, b, total)

    walk(0, 0, 0.0)
    top = max(totals)
    return top + math.log(math.fsum(math.exp(total - top) for total in totals)), len(totals)


def values_and_gradients(x, x_offsets, y=None, y_offsets=None, *, bandwidth, backend, seed=0, **options):
    """Returns log K and the gradients of a random weighted sum of it to x, y and the bandwidth."""
    # Eager takes many small steps, which become very slow if other processes hold the cores that its threads wait for.
    torch.set_num_threads(1 if backend == "eager" else 2)
    leaves = [x.detach().clone().requires_grad_()]
    if y is not None:
        leaves.append(y.detach().clone().requires_grad_())
    sigma = torch.tensor(bandwidth, dtype=torch.float64, requires_grad=True)
    log_k = alignment_kernel(
        leaves[0], x_offsets, None if y is None else leaves[1], y_offsets, bandwidth=sigma, backend=backend, **options
    )
    weights = torch.randn(log_k.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gradients = torch.autograd.grad((log_k * weights.to(log_k)).sum(), [*leaves, sigma])
    return [log_k.detach(), *gradients]


def assert_close(actual, expected, tolerance, absolute=0.0):
    """Checks that errors are at most `tolerance` times the largest expected entry (or 1), plus `absolute`."""
    assert torch.isfinite(actual).all()
    scale = max(1.0, expected.abs().max().item())
    error = max(0.0, (actual.double() - expected.double()).abs().max().item() - absolute) / scale
    assert error <= tolerance, f"{error:.2e} of scale {scale:.3g}"
