"""The Triton kernels in Triton's interpreter.

test_alignment_triton.py runs this file in its own process with TRITON_INTERPRET=1: Triton decides at import whether to
use the interpreter.
"""

import pytest
import torch

from hf_unigd.kernels import triton_backend
from kernel_cases import assert_close, packed, values_and_gradients


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"bandwidth": 2.0, "normalize": "none"}, torch.float64),
        ({"bandwidth": 2.0, "normalize": "none"}, torch.float32),
        ({"bandwidth": 0.05, "normalize": "cosine"}, torch.float64),
        ({"bandwidth": 0.05, "normalize": "cosine"}, torch.float32),
        ({"bandwidth": 0.01, "normalize": "none"}, torch.float64),
        ({"bandwidth": 1.0, "per_pair_bandwidth": True}, torch.float64),
        ({"bandwidth": 2.0, "local": "plain_gaussian"}, torch.float64),
    ],
)
def test_against_the_reference(options, dtype):
    """Covers more than one group of lanes, and Gram matrices of one side and of two sides."""
    x, x_offsets = packed([3, 7, 1, 5], 6, dtype=dtype)
    y, y_offsets = packed([2, 4, 1] * 12, 6, seed=1, dtype=dtype)
    values, gradients = (1e-12, 1e-9) if dtype == torch.float64 else (2e-5, 1e-3)
    for other in ((), (y, y_offsets)):
        wide = tuple(t.double() if t.is_floating_point() else t for t in other)
        actual = values_and_gradients(x, x_offsets, *other, backend="triton", **options)
        expected = values_and_gradients(x.double(), x_offsets, *wide, backend="reference", **options)
        assert_close(actual[0], expected[0], values)
        rounding = 20 * torch.finfo(torch.float64).eps * expected[0].abs().max().item()  # of the sums along a path
        for a, e in zip(actual[1:], expected[1:], strict=True):
            assert_close(a, e, gradients + rounding)


def test_blocks_and_modalities(monkeypatch):
    monkeypatch.setattr(triton_backend, "BLOCK_CELLS", 400)
    x, offsets = packed([3, 4, 1, 2] * 10, 6)
    options = {
        "bandwidth": 2.0,
        "modality_columns": {(0, 0): (0, 2), (1, 1): (2, 4), (0, 1): (4, 6)},
        "x_modalities": torch.arange(len(x)) % 2,
    }
    actual = values_and_gradients(x, offsets, backend="triton", **options)
    expected = values_and_gradients(x, offsets, backend="eager", **options)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-10)
