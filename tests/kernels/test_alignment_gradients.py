"""The explicit backward: gradcheck, properties of the posterior, and the certificate for linear arithmetic."""

import pytest
import torch

from hf_unigd.kernels import alignment_kernel, alignment_posterior, compiled, mean_slice_similarity, ops, soft_dtw
from hf_unigd.kernels.reference import expected_alignment, log_alpha
from kernel_cases import FAST_BACKENDS, assert_close, log_kappa, packed, values_and_gradients


@pytest.mark.parametrize(
    "options", [{}, {"normalize": "cosine"}, {"per_pair_bandwidth": True}, {"local": "plain_gaussian"}]
)
@pytest.mark.parametrize("backend", ["reference", *FAST_BACKENDS])
def test_gradcheck(backend, options):
    x, x_offsets = packed([1, 3, 2], 2)
    y, y_offsets = packed([4, 1], 2, seed=1)
    sigma = torch.tensor(1.2, dtype=torch.float64, requires_grad=True)
    options = {"normalize": "none", **options, "backend": backend}

    def kernel(x, y, sigma):
        return alignment_kernel(x, x_offsets, y, y_offsets, bandwidth=sigma, **options)

    def gram(x, sigma):
        return alignment_kernel(x, x_offsets, bandwidth=sigma, **options)

    assert torch.autograd.gradcheck(kernel, (x.requires_grad_(), y.requires_grad_(), sigma))
    assert torch.autograd.gradcheck(gram, (x, sigma))


@pytest.mark.parametrize("how", ["eager", "compile"])
def test_the_median_bandwidth_is_detached(how):
    """The gradient equals that of the same bandwidth given as a number."""
    x, offsets = packed([2, 5, 3], 4)
    sigma = ops.median_bandwidth(x, offsets, None, []).item()

    def gradient(bandwidth):
        def loss(x):
            return alignment_kernel(x, offsets, bandwidth=bandwidth).square().sum()

        function = torch.compile(loss, fullgraph=True, backend="aot_eager") if how == "compile" else loss
        leaf = x.clone().requires_grad_()
        function(leaf).backward()
        return leaf.grad

    assert_close(gradient("median"), gradient(sigma), 1e-13)
    assert gradient("median").abs().max() > 0


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_gradcheck_of_the_other_functions(backend):
    x, offsets = packed([2, 3], 2)
    gamma = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, g: soft_dtw(x, offsets, gamma=g, backend=backend), (x, gamma))
    assert torch.autograd.gradcheck(
        lambda x, g: soft_dtw(x, offsets, gamma=g, divergence=True, backend=backend), (x, gamma)
    )
    assert torch.autograd.gradcheck(lambda x: mean_slice_similarity(x, offsets), (x,))


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("sizes", [[64, 60], [64, 7], [3, 1]])
@pytest.mark.parametrize("bandwidth", [0.1, 0.3, 1.0, 4.0, 30.0])
def test_float32_gradients(backend, sizes, bandwidth):
    """The backward shows errors that the forward hides. Covers all regimes of u times length."""
    x, offsets = packed(sizes, 16, dtype=torch.float32)
    x = torch.nn.functional.normalize(x, dim=-1)
    actual = values_and_gradients(x, offsets, bandwidth=bandwidth, backend=backend, normalize="none")
    expected = values_and_gradients(x.double(), offsets, bandwidth=bandwidth, backend="eager", normalize="none")
    # At u = 100 per cell, rounding the distances alone changes the posterior by this much.
    tolerance = 1e-3 if bandwidth == 0.1 else 2e-4
    assert_close(actual[0], expected[0], 2e-5)
    for a, e in zip(actual[1:], expected[1:], strict=True):
        assert_close(a, e, tolerance)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("bandwidth", [0.1, 0.05, 0.01])
def test_float32_gradients_where_log_k_is_large(backend, bandwidth):
    """log K is -1e6 to -1e9. In float32, rounding in the recursion would be as large as the posterior."""
    x, offsets = packed([32, 32], 64, dtype=torch.float32)
    pairs = torch.tensor([[0, 1]])
    options = {"bandwidth": bandwidth, "pairs": pairs, "normalize": "none"}
    actual = values_and_gradients(x, offsets, backend=backend, **options)
    expected = values_and_gradients(x.double(), offsets, backend="reference", **options)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-6)
    options = {"bandwidth": bandwidth, "pairs": pairs}
    posterior = alignment_posterior(x, offsets, backend=backend, **options)
    assert posterior.dtype == torch.float32
    assert_close(posterior, alignment_posterior(x.double(), offsets, backend="reference", **options), 1e-5)


def test_the_certificate_catches_what_the_bound_lets_through(compiled_backend, monkeypatch):
    """Without the bound, linear arithmetic underflows. The forward is not finite, and the backward detects this."""
    x, offsets = packed([40, 50, 33], 8)
    options = {"bandwidth": 0.4, "normalize": "none", "backend": "compiled"}
    expected = values_and_gradients(x, offsets, **options)
    monkeypatch.setattr(compiled, "LINEAR_LIMIT", float("inf"))
    broken, *gradients = values_and_gradients(x, offsets, **options)
    assert not torch.isfinite(broken).all()
    for a, e in zip(gradients, expected[1:], strict=True):
        assert_close(a, e, 1e-9)


def test_linear_and_logarithmic_arithmetic_agree(compiled_backend, monkeypatch):
    x, offsets = packed([30, 50, 11] * 7, 8)
    linear = values_and_gradients(x, offsets, bandwidth=3.0, backend="compiled")
    monkeypatch.setattr(compiled, "LINEAR_LIMIT", 0.0)
    logarithmic = values_and_gradients(x, offsets, bandwidth=3.0, backend="compiled")
    assert not torch.equal(linear[1], logarithmic[1])
    for a, e in zip(linear, logarithmic, strict=True):
        assert_close(a, e, 1e-11)


def test_deterministic_on_request(compiled_backend):
    x, offsets = packed([12, 30, 9, 22] * 20, 24, dtype=torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [values_and_gradients(x, offsets, bandwidth=2.0, backend="compiled") for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threads_do_not_disturb_each_other(compiled_backend, dtype, paired):
    """Results with more threads than cores equal those with one thread."""
    x, offsets = packed([12, 30, 9, 22] * 20, 24, dtype=dtype)
    pairs = torch.randint(80, (1000, 2), generator=torch.Generator().manual_seed(0)) if paired else None
    runs = []
    before = torch.get_num_threads()
    for threads in (1, 7, 7, 7):
        torch.set_num_threads(threads)
        leaf = x.clone().requires_grad_()
        log_k = alignment_kernel(leaf, offsets, bandwidth=2.0, pairs=pairs, backend="compiled")
        runs.append([log_k.detach(), *torch.autograd.grad(log_k.square().sum(), leaf)])
    torch.set_num_threads(before)
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            assert_close(a, b, 1e-5 if dtype == torch.float32 else 1e-13)


def test_reference_posterior_is_the_derivative():
    """alpha and beta of the reference agree with automatic differentiation of the recursion, which uses neither."""
    x, _ = packed([9], 3)
    matrix = log_kappa(x[:4], x[4:], 1.1)

    def log_k(matrix):
        rows = [[None] * 5 for _ in range(4)]
        for i in range(4):
            for j in range(5):
                before = [rows[a][b] for a, b in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if a >= 0 and b >= 0]
                rows[i][j] = matrix[i, j] + (torch.logsumexp(torch.stack(before), 0) if before else 0)
        return rows[3][4]

    matrix.requires_grad_()
    value = log_k(matrix)
    (expected,) = torch.autograd.grad(value, matrix)
    assert_close(log_alpha(matrix.detach())[-1, -1], value.detach(), 1e-14)
    assert_close(expected_alignment(matrix.detach()), expected, 1e-13)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_posterior(backend):
    x, offsets = packed([4, 9, 1, 6], 3)
    pairs = torch.tensor([[0, 1], [2, 3], [1, 1]])
    expected = alignment_posterior(x, offsets, bandwidth=1.0, pairs=pairs, backend=backend)
    assert expected.shape == (3, 9, 9)
    assert_close(expected, alignment_posterior(x, offsets, bandwidth=1.0, pairs=pairs, backend="reference"), 1e-12)
    for matrix, (n, m) in zip(expected, [(4, 9), (1, 6), (9, 9)], strict=True):
        inside = matrix[:n, :m]
        assert matrix.sum() == inside.sum()
        assert inside[0, 0] == pytest.approx(1) and inside[-1, -1] == pytest.approx(1)
        assert (inside.sum(0) > 1 - 1e-12).all() and (inside.sum(1) > 1 - 1e-12).all()
        assert max(n, m) - 1e-9 <= inside.sum() <= n + m - 1 + 1e-9
    assert alignment_posterior(x, offsets, bandwidth=1.0).shape == (1, 4, 9)
