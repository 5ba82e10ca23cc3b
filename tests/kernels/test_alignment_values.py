"""log K compared with path enumeration, tslearn and the float64 reference, and its invariances."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_unigd.kernels import alignment_kernel, compiled, ops, soft_dtw
from kernel_cases import (
    FAST_BACKENDS,
    assert_close,
    enumerate_alignments,
    log_kappa,
    offsets_of,
    packed,
    sequences,
    values_and_gradients,
)


BACKENDS = ["reference", *FAST_BACKENDS]


@pytest.mark.parametrize("local", ["gaussian", "plain_gaussian"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_alignment_is_counted(backend, local):
    x, offsets = packed([1, 2, 3, 4, 5, 5], 3)
    log_k = alignment_kernel(x, offsets, bandwidth=1.3, normalize="none", local=local, backend=backend)
    for i, a in enumerate(sequences(x, offsets)):
        for j, b in enumerate(sequences(x, offsets)):
            expected, _ = enumerate_alignments(log_kappa(a, b, 1.3, local))
            assert abs(log_k[i, j].item() - expected) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_slices_count_the_alignments(backend):
    """With kappa = 1 everywhere, K is a Delannoy number: 1, 3, 13, 63, 321 on the diagonal."""
    log_k = alignment_kernel(
        torch.ones(15, 2), offsets_of([1, 2, 3, 4, 5]), bandwidth=1.0, normalize="none", backend=backend
    )
    assert log_k.diagonal().exp().round().tolist() == [1, 3, 13, 63, 321]


def test_path_count_is_exact():
    count = [[1] * 41]
    for _ in range(40):
        row = [1]
        for j in range(1, 41):
            row.append(row[-1] + count[-1][j] + count[-1][j - 1])
        count.append(row)
    lengths = torch.arange(1, 42)
    table = ops.log_path_count(lengths[:, None], lengths[None])
    expected = torch.tensor([[float(np.log(float(c))) for c in row] for row in count], dtype=torch.float64)
    assert (table - expected).abs().max() < 1e-12


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_agrees_with_tslearn(backend):
    metrics = pytest.importorskip("tslearn.metrics")
    utils = pytest.importorskip("tslearn.utils")
    x, offsets = packed([3, 7, 5, 12], 4)
    series = utils.to_time_series_dataset([s.numpy() for s in sequences(x, offsets)])
    ours = alignment_kernel(x, offsets, bandwidth=2.5, backend=backend)
    np.testing.assert_allclose(ours.exp().numpy(), metrics.cdist_gak(series, sigma=2.5), rtol=1e-10)
    ours = soft_dtw(x, offsets, gamma=0.7, backend=backend)
    np.testing.assert_allclose(ours.numpy(), metrics.cdist_soft_dtw(series, gamma=0.7), rtol=1e-10)
    ours = soft_dtw(x, offsets, gamma=0.7, divergence=True, backend=backend)
    np.testing.assert_allclose(ours.numpy(), metrics.cdist_soft_dtw_normalized(series, gamma=0.7), atol=1e-10)


lengths = st.lists(st.integers(1, 9), min_size=1, max_size=20)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    x_lengths=lengths,
    y_lengths=st.none() | lengths,
    d=st.sampled_from([1, 3, 17]),
    exponent=st.floats(-3, 3),
    offset=st.sampled_from([0.0, 100.0]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    duplicates=st.booleans(),
    per_pair=st.booleans(),
    local=st.sampled_from(["gaussian", "plain_gaussian"]),
    paired=st.booleans(),
)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_agrees_with_the_reference(
    backend, x_lengths, y_lengths, d, exponent, offset, dtype, duplicates, per_pair, local, paired
):
    x, x_offsets = packed(x_lengths, d, dtype=dtype)
    x = x + torch.tensor(offset, dtype=dtype)
    if duplicates:  # equal slices, within and between sequences
        x = x[torch.randint(len(x), (len(x),), generator=torch.Generator().manual_seed(1)) // 2]
    y = y_offsets = None
    if y_lengths is not None:
        y, y_offsets = packed(y_lengths, d, seed=2, dtype=dtype)
        y = y + torch.tensor(offset, dtype=dtype)
    pairs = None
    if paired:
        count = len(x_lengths if y_lengths is None else y_lengths)
        pairs = torch.stack([torch.arange(18) % len(x_lengths), (5 * torch.arange(18) + 1) % count], 1)
    options = {
        "bandwidth": 10.0**exponent,
        "per_pair_bandwidth": per_pair,
        "local": local,
        "pairs": pairs,
        "normalize": "none",
    }
    actual = values_and_gradients(x, x_offsets, y, y_offsets, backend=backend, **options)
    wide = None if y is None else y.double()
    expected = values_and_gradients(x.double(), x_offsets, wide, y_offsets, backend="reference", **options)
    assert actual[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    values, gradients = {
        torch.float64: (1e-12, 1e-9),
        torch.float32: (2e-5, 5e-4),
        torch.bfloat16: (2e-5, 2e-2),  # the gradient is rounded to bfloat16
    }[dtype]
    assert_close(actual[0], expected[0], values)
    eps = torch.finfo(actual[0].dtype).eps
    # The weights of alignments are exponentials of sums of the size of log K, which are rounded to double.
    gradients += 2 * torch.finfo(torch.float64).eps * expected[0].abs().max().item()
    # The gradient is a difference of terms of the size of the features over sigma squared.
    terms = 20 * eps * x.double().abs().max().item() / options["bandwidth"] ** 2
    for a, e in zip(actual[1:], expected[1:], strict=True):
        assert_close(a, e, gradients, absolute=terms)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("bandwidth", [0.1, 0.01, 1e-3])
def test_gradients_in_float32_at_small_bandwidths(backend, bandwidth):
    x, offsets = packed([32, 32], 64, dtype=torch.float32)
    _, gradient = values_and_gradients(x, offsets, bandwidth=bandwidth, backend=backend)[:2]
    _, expected = values_and_gradients(x.double(), offsets, bandwidth=bandwidth, backend="reference")[:2]
    assert_close(gradient, expected, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_close_slices_far_from_the_origin(backend, dtype):
    """Their distances are recomputed, and may then be too large for linear arithmetic."""
    far = [[1024.0, 0.0], [1024.0, 0.1]]
    x = torch.tensor([far[place % 2] for place in range(16) for _ in range(2)] + [[-2048.0, 0.0]] * 16).to(dtype)
    offsets = offsets_of([2] * 16 + [1] * 16)
    actual = alignment_kernel(x, offsets, bandwidth=0.005, normalize="none", backend=backend)
    expected = alignment_kernel(x.double(), offsets, bandwidth=0.005, normalize="none", backend="reference")
    assert_close(actual, expected, 2e-5)


@pytest.mark.parametrize("instruction_set", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bandwidth", [2.0, 0.05])  # linear and logarithmic arithmetic
def test_every_instruction_set(compiled_backend, monkeypatch, instruction_set, dtype, bandwidth):
    """An instruction set that the processor lacks selects its best one."""
    monkeypatch.setattr(compiled, "INSTRUCTION_SET", instruction_set)
    x, offsets = packed([13, 30, 7, 22] * 9, 40, dtype=dtype)
    actual = values_and_gradients(x, offsets, bandwidth=bandwidth, backend="compiled")
    expected = values_and_gradients(x.double(), offsets, bandwidth=bandwidth, backend="eager")
    assert_close(actual[0], expected[0], 1e-12 if dtype == torch.float64 else 2e-5)
    for a, e in zip(actual[1:], expected[1:], strict=True):
        assert_close(a, e, 1e-9 if dtype == torch.float64 else 1e-3)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_order_of_the_batch_does_not_matter(backend):
    x, offsets = packed([4, 9, 1, 9, 6], 5, dtype=torch.float32)
    order = [3, 0, 4, 2, 1]
    parts = sequences(x, offsets)
    shuffled = torch.cat([parts[i] for i in order]), offsets_of([len(parts[i]) for i in order])
    log_k = alignment_kernel(x, offsets, bandwidth=2.0, backend=backend)
    assert_close(alignment_kernel(*shuffled, bandwidth=2.0, backend=backend), log_k[order][:, order], 1e-6)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_symmetry_and_self_similarity(backend):
    x, x_offsets = packed([4, 9, 1, 20], 5)
    y, y_offsets = packed([3, 30, 8], 5, seed=1)
    one_way = alignment_kernel(x, x_offsets, y, y_offsets, bandwidth=2.0, backend=backend)
    assert_close(alignment_kernel(y, y_offsets, x, x_offsets, bandwidth=2.0, backend=backend).T, one_way, 1e-13)
    gram = alignment_kernel(x, x_offsets, bandwidth=2.0, backend=backend)
    assert torch.equal(gram, gram.T)
    assert (gram.diagonal() == 0).all()
    assert (gram <= 1e-12).all()
    assert_close(alignment_kernel(x, x_offsets, x, x_offsets, bandwidth=2.0, backend=backend), gram, 1e-13)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_padding_may_hold_anything(backend):
    x, offsets = packed([4, 9, 1], 5)
    padded = torch.full((3, 11, 5), torch.nan, dtype=torch.float64)
    for row, part in zip(padded, sequences(x, offsets), strict=True):
        row[: len(part)] = part
    padded.requires_grad_()
    log_k = alignment_kernel(padded, x_lengths=offsets.diff(), bandwidth=2.0, backend=backend)
    assert torch.equal(log_k, alignment_kernel(x, offsets, bandwidth=2.0, backend=backend))
    (gradient,) = torch.autograd.grad(log_k.sum(), padded)
    assert torch.isfinite(gradient).all()
    assert all((row[n:] == 0).all() for row, n in zip(gradient, [4, 9, 1], strict=True))


def test_padded_without_lengths_means_full():
    x, offsets = packed([4, 4], 5)
    expected = alignment_kernel(x, offsets, bandwidth=2.0)
    assert torch.equal(alignment_kernel(x.view(2, 4, 5), bandwidth=2.0), expected)


def test_normalizations():
    x, offsets = packed([2, 9, 4], 3)
    options = {"bandwidth": 2.0, "backend": "reference"}
    raw = alignment_kernel(x, offsets, normalize="none", **options)
    selves = raw.diagonal()
    cosine = raw - (selves[:, None] + selves) / 2
    assert torch.equal(alignment_kernel(x, offsets, normalize="cosine", **options), cosine)
    n = offsets.diff().double()
    expected = cosine / ((n[:, None] + n) / 2)
    assert_close(alignment_kernel(x, offsets, normalize="length", **options), expected, 1e-14)
    # "content" is zero for sequences that differ only in length.
    same = alignment_kernel(torch.ones(9, 3), offsets_of([2, 6, 1]), normalize="content", **options)
    assert_close(same, torch.zeros(3, 3), 1e-6)
    assert alignment_kernel(torch.ones(9, 3), offsets_of([2, 6, 1]), normalize="cosine", **options)[0, 1] < -1
    # The same pairs through `pairs` and through `y`.
    for normalize in ("cosine", "length", "content"):
        gram = alignment_kernel(x, offsets, normalize=normalize, **options)
        pairs = torch.tensor([[0, 1], [2, 2], [1, 0]])
        chosen = alignment_kernel(x, offsets, pairs=pairs, normalize=normalize, **options)
        assert_close(chosen, gram[pairs[:, 0], pairs[:, 1]], 1e-13)
        assert_close(alignment_kernel(x, offsets, x, offsets, normalize=normalize, **options), gram, 1e-13)


def test_the_papers_bandwidth_per_pair():
    x, offsets = packed([2, 9], 3)
    log_k = alignment_kernel(x, offsets, bandwidth=0.7, per_pair_bandwidth=True, normalize="none")
    a, b = sequences(x, offsets)
    expected = alignment_kernel(a, offsets_of([2]), b, offsets_of([9]), bandwidth=0.7 * 5.5**0.5, normalize="none")
    assert_close(log_k[0, 1], expected[0, 0], 1e-13)


def test_median_bandwidth():
    x, offsets = packed([4, 2, 9], 3)
    sigma = torch.pdist(x).median() * 4**0.5  # the median of the true lengths is 4
    log_k = alignment_kernel(x, offsets, bandwidth="median")
    assert_close(log_k, alignment_kernel(x, offsets, bandwidth=sigma.item()), 1e-12)
    assert torch.isfinite(alignment_kernel(torch.ones(3, 2), offsets_of([1, 2]), bandwidth="median")).all()


def test_lengths_alone_explain_the_cosine_score_at_the_textbook_bandwidth():
    """This is the reason for `normalize="content"`."""
    sizes = torch.randint(1, 40, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    x, offsets = packed(sizes, 32)
    x = torch.nn.functional.normalize(x, dim=-1)
    n = torch.tensor(sizes)
    count = ops.log_path_count(n[:, None], n[None])
    by_length = count - (count.diagonal()[:, None] + count.diagonal()) / 2
    upper = torch.triu_indices(40, 40, 1).unbind()

    def explained(normalize):
        score = alignment_kernel(x, offsets, bandwidth="median", normalize=normalize)[upper]
        return torch.corrcoef(torch.stack([score, by_length[upper]]))[0, 1] ** 2

    assert explained("cosine") > 0.99
    assert explained("content") < explained("cosine")


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("scale", "bandwidth"), [(1e18, 1e-3), (1e-25, 1e-3), (1.0, 1e-30), (1.0, 1e30), (0.0, 1.0)])
def test_finite_for_any_finite_input(backend, dtype, scale, bandwidth):
    x, offsets = packed([5, 17, 1], 6, dtype=dtype, scale=scale)
    for local in ("gaussian", "plain_gaussian"):
        for normalize in ("none", "cosine"):
            options = {"bandwidth": bandwidth, "local": local, "normalize": normalize, "backend": backend}
            assert torch.isfinite(alignment_kernel(x, offsets, **options)).all()


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cancelled_distances_too_large_for_linear_arithmetic(backend, dtype):
    """The expanded square rounds |a - b|^2 to 0. The recomputed value must count in the bound of the arithmetic."""
    near = torch.tensor([[1024.0, 0], [1024.0, 0.1]], dtype=dtype)
    x, sizes = near, [1, 1]
    if dtype == torch.float32:  # float32 features are centred, so slices on the other side keep the norms large
        x = torch.cat([near.repeat_interleave(2, 0).repeat(8, 1), torch.tensor([[-2048.0, 0]]).repeat(16, 1)])
        sizes = [2] * 16 + [1] * 16
    options = {"bandwidth": 0.005, "normalize": "none"}
    actual = alignment_kernel(x, offsets_of(sizes), backend=backend, **options)
    expected = alignment_kernel(x.double(), offsets_of(sizes), backend="reference", **options)
    assert expected[0, 1] < -200
    assert_close(actual, expected, 2e-5)
    assert_close(actual[0, 1], expected[0, 1], 2e-5)  # relative to its own scale, not to that of the distant slices


@pytest.mark.parametrize("d", [1, 4096])
def test_few_and_many_features(d):
    x, offsets = packed([3, 19, 8], d, dtype=torch.float32)
    log_k = alignment_kernel(x, offsets, bandwidth=d**0.5)
    assert_close(log_k, alignment_kernel(x.double(), offsets, bandwidth=d**0.5, backend="reference"), 2e-5)


def test_long_sequences(compiled_backend):
    """Such a pair is too large to hold, so the forward and the backward process it in parts."""
    x, offsets = packed([530, 600, 90], 4)
    expected = values_and_gradients(x, offsets, bandwidth=3.0, backend="eager")
    for a, e in zip(values_and_gradients(x, offsets, bandwidth=3.0, backend="compiled"), expected, strict=True):
        assert_close(a, e, 1e-9)


def test_2048_slices(compiled_backend):
    x = torch.ones(2048 + 5, 2, requires_grad=True)
    log_k = alignment_kernel(x, offsets_of([2048, 5]), bandwidth=1.0, normalize="none", backend="compiled")
    n = torch.tensor([2048, 5])
    assert_close(log_k.detach(), ops.log_path_count(n[:, None], n[None]), 1e-6)
    (gradient,) = torch.autograd.grad(log_k.sum(), x)
    assert gradient.abs().max() < 1e-3  # the gradients of equal slices cancel
