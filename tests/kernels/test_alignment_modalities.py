"""The Triple Kernel, and when the kernel is positive definite."""

import pytest
import torch
import torch.nn.functional as F

from hf_unigd.kernels import alignment_kernel, alignment_posterior, mean_slice_similarity
from hf_unigd.kernels.reference import log_alpha
from kernel_cases import FAST_BACKENDS, assert_close, log_kappa, offsets_of, packed, sequences, values_and_gradients


# Features are [DINOv2 or BGE | CLIP]. Modality 0 is images and 1 is texts.
SUGAR = {(0, 0): (0, 5), (1, 1): (0, 5), (0, 1): (5, 12)}
# Each encoder has its own columns.
APART = {(0, 0): (0, 4), (1, 1): (4, 8), (0, 1): (8, 12)}


def inputs(sizes, seed, dtype=torch.float64):
    x, offsets = packed(sizes, 12, seed=seed, dtype=dtype)
    return x, offsets, torch.randint(2, (len(x),), generator=torch.Generator().manual_seed(seed + 50))


@pytest.mark.parametrize("modality_columns", [SUGAR, APART])
@pytest.mark.parametrize("backend", ["reference", *FAST_BACKENDS])
def test_the_pair_of_modalities_selects_the_columns(backend, modality_columns):
    x, offsets, modalities = inputs([3, 6, 1], 0)
    log_k = alignment_kernel(
        x,
        offsets,
        bandwidth=2.0,
        normalize="none",
        modality_columns=modality_columns,
        x_modalities=modalities,
        backend=backend,
    )
    parts, ids = sequences(x, offsets), sequences(modalities, offsets)
    for i in range(3):
        for j in range(3):
            matrix = torch.empty(len(parts[i]), len(parts[j]), dtype=torch.float64)
            for r, p in enumerate(ids[i].tolist()):
                for c, q in enumerate(ids[j].tolist()):
                    start, stop = modality_columns[min(p, q), max(p, q)]
                    matrix[r, c] = log_kappa(parts[i][r : r + 1, start:stop], parts[j][c : c + 1, start:stop], 2.0)
            assert abs(log_k[i, j] - log_alpha(matrix)[-1, -1]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("paired", [False, True])
def test_values_and_gradients(backend, dtype, paired):
    x, x_offsets, x_modalities = inputs([3, 20, 1, 8] * 5, 0, dtype)
    y, y_offsets, y_modalities = inputs([4, 2, 13] * 6, 1, dtype)
    pairs = torch.stack([torch.arange(18), torch.arange(18).flip(0)], 1) if paired else None
    options = {
        "bandwidth": 1.5,
        "modality_columns": SUGAR,
        "x_modalities": x_modalities,
        "y_modalities": y_modalities,
        "pairs": pairs,
    }
    actual = values_and_gradients(x, x_offsets, y, y_offsets, backend=backend, **options)
    expected = values_and_gradients(x.double(), x_offsets, y.double(), y_offsets, backend="reference", **options)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-11 if dtype == torch.float64 else 1e-4)
    assert_close(
        alignment_posterior(x, x_offsets, y, y_offsets, **{**options, "pairs": torch.tensor([[1, 2]])}),
        alignment_posterior(
            x.double(),
            x_offsets,
            y.double(),
            y_offsets,
            **{**options, "pairs": torch.tensor([[1, 2]])},
            backend="reference",
        ),
        1e-5,
    )


def test_a_pair_of_modalities_without_columns():
    x, offsets, modalities = inputs([3, 6], 0)
    options = {"bandwidth": 1.0, "modality_columns": {(0, 0): (0, 5), (1, 1): (0, 5)}}
    with pytest.raises(ValueError, match=r"`modality_columns` has no columns for the modality pair \(0, 1\)"):
        alignment_kernel(x, offsets, x_modalities=modalities, **options)
    alignment_kernel(x, offsets, x_modalities=torch.zeros_like(modalities), **options)


def test_mean_slice_similarity():
    x, offsets, modalities = inputs([3, 6, 1], 0)
    parts, ids = sequences(x, offsets), sequences(modalities, offsets)
    plain = mean_slice_similarity(x, offsets)
    triple = mean_slice_similarity(x, offsets, modality_columns=SUGAR, x_modalities=modalities)
    for i in range(3):
        for j in range(3):
            assert plain[i, j] == pytest.approx((F.normalize(parts[i]) @ F.normalize(parts[j]).T).mean().item())
            total = 0.0
            for a, p in zip(parts[i], ids[i].tolist(), strict=True):
                for b, q in zip(parts[j], ids[j].tolist(), strict=True):
                    start, stop = SUGAR[min(p, q), max(p, q)]
                    total += F.cosine_similarity(a[start:stop], b[start:stop], dim=0).item()
            assert triple[i, j] == pytest.approx(total / len(parts[i]) / len(parts[j]))
    padded = torch.full((3, 7, 12), torch.nan, dtype=torch.float64)
    for row, part in zip(padded, parts, strict=True):
        row[: len(part)] = part
    assert_close(mean_slice_similarity(padded, x_lengths=offsets.diff()), plain, 1e-14)
    pairs = torch.tensor([[2, 0], [1, 1]])
    assert_close(mean_slice_similarity(x, offsets, pairs=pairs), plain[pairs[:, 0], pairs[:, 1]], 1e-14)


def smallest_eigenvalue(log_k):
    return torch.linalg.eigvalsh(log_k.exp())[0].item()


def test_positive_definite_for_one_modality():
    for seed in range(20):
        x, offsets = packed([1, 2, 7, 4, 1, 3, 12, 5], 2, seed=seed)
        for bandwidth in (0.3, 1.0, 5.0):
            assert smallest_eigenvalue(alignment_kernel(x, offsets, bandwidth=bandwidth)) > -1e-10


def test_triple_kernel_is_not_promised_positive_definite():
    """A counterexample: two images that are orthogonal in DINOv2, both equal to their caption in CLIP."""
    images = torch.tensor([[1.0, 0, 1, 0], [0, 1, 1, 0]], dtype=torch.float64)
    caption = torch.tensor([[1.0, 0, 1, 0]], dtype=torch.float64)
    log_k = alignment_kernel(
        torch.cat([images, caption]),
        offsets_of([1, 1, 1]),
        bandwidth=0.5,
        modality_columns={(0, 0): (0, 2), (1, 1): (0, 2), (0, 1): (2, 4)},
        x_modalities=torch.tensor([0, 0, 1]),
    )
    assert smallest_eigenvalue(log_k) == pytest.approx(-0.41, abs=0.01)
