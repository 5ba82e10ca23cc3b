"""The Triton backend without a GPU: run in the interpreter, and compiled ahead of time for three generations."""

import os
import subprocess
import sys

import pytest
import torch
from kernel_cases import assert_close, packed, values_and_gradients

from hf_unigd.kernels import triton_backend

triton = pytest.importorskip("triton")

# Triton's own library is decorated when it is imported, for the interpreter or not: one process cannot have both.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
in_the_interpreter = pytest.mark.skipif(not INTERPRETED, reason="run by test_the_interpreter in a process of its own")
to_be_compiled = pytest.mark.skipif(INTERPRETED, reason="not compiled in the interpreter")


@to_be_compiled
def test_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stdout
    assert "9 passed, 7 skipped" in process.stdout


@in_the_interpreter
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "options",
    [
        {"bandwidth": 2.0, "normalize": "none"},
        {"bandwidth": 0.05, "normalize": "cosine"},
        {"bandwidth": 1.0, "per_pair_bandwidth": True},
        {"bandwidth": 2.0, "local": "plain_gaussian"},
    ],
)
def test_against_the_reference(options, dtype):
    """More than one group of lanes, and both Gram matrices."""
    x, x_offsets = packed([3, 7, 1, 5], 6, dtype=dtype)
    y, y_offsets = packed([2, 4, 1] * 12, 6, seed=1, dtype=dtype)
    values, gradients = (1e-12, 1e-9) if dtype == torch.float64 else (2e-5, 1e-3)
    for other in ((), (y, y_offsets)):
        wide = tuple(t.double() if t.is_floating_point() else t for t in other)
        actual = values_and_gradients(x, x_offsets, *other, backend="triton", **options)
        expected = values_and_gradients(x.double(), x_offsets, *wide, backend="reference", **options)
        assert_close(actual[0], expected[0], values)
        rounding = 2 * torch.finfo(dtype).eps * expected[0].abs().max().item()
        for a, e in zip(actual[1:], expected[1:], strict=True):
            assert_close(a, e, gradients + rounding)


@in_the_interpreter
def test_blocks_and_modalities(monkeypatch):
    monkeypatch.setattr(triton_backend, "BLOCK_CELLS", 400)
    x, offsets = packed([3, 4, 1, 2] * 10, 6)
    options = {
        "bandwidth": 2.0,
        "spaces": {(0, 0): (0, 2), (1, 1): (2, 4), (0, 1): (4, 6)},
        "x_modalities": torch.arange(len(x)) % 2,
    }
    actual = values_and_gradients(x, offsets, backend="triton", **options)
    expected = values_and_gradients(x, offsets, backend="eager", **options)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-10)


KERNELS = {
    "forward_kernel": (["CELLS", "ALPHA", "LOG_K"], {"KEEP": [False, True]}),
    "backward_kernel": (["CELLS", "ALPHA", "BELOW", "LOG_K", "GRAD", "BY_SCALE"], {}),
}


@to_be_compiled
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", list(KERNELS))
def test_compiles_ahead_of_time(name, capability):
    """The interpreter accepts type errors that compilation refuses."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hf_unigd.kernels import triton_kernels

    kernel = getattr(triton_kernels, name)
    tensors, switches = KERNELS[name]
    for dtype in ("fp32", "fp64"):
        for keep in switches.get("KEEP", [None]):
            signature = dict.fromkeys(tensors, f"*{dtype}") | dict.fromkeys(["OFFSETS", "GROUPS", "LENGTHS"], "*i64")
            signature |= {"SCALE": f"*{dtype}", "columns": "i32"}
            constants = {"W": 32, "GAUSSIAN": True, "PER_PAIR": True, "FAST": dtype == "fp32"}
            constants |= {} if keep is None else {"KEEP": keep}
            signature |= dict.fromkeys(constants, "constexpr")
            source = ASTSource(kernel, signature=signature, constexprs=constants)
            binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 1})
            assert f".target sm_{capability}" in binary.asm["ptx"]
            assert len(binary.asm["cubin"]) > 0
            if dtype == "fp32":
                assert "lg2.approx.ftz.f32" in binary.asm["ptx"]
            assert "bar.sync" not in binary.asm["ptx"] and "shfl" not in binary.asm["ptx"]
