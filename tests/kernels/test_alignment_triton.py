"""The Triton backend without a GPU: in the interpreter, and compiled ahead of time for three GPU generations."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_unigd.kernels import triton_backend
from hf_unigd.kernels.problem import ieee_products


triton = pytest.importorskip("triton")


def test_the_interpreter():
    script = Path(__file__).with_name("interpreted_triton.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(script)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stdout
    assert "8 passed" in process.stdout


def test_not_on_amd(monkeypatch):
    """torch calls AMD devices "cuda" as well."""
    device = torch.device("cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert triton_backend.is_available(device)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not triton_backend.is_available(device)


def test_products_are_ieee_where_the_caller_allows_tf32():
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with ieee_products():
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


KERNELS = {
    "forward_kernel": (["CELLS", "ALPHA", "LOG_K"], {"KEEP": [False, True]}),
    "backward_kernel": (["CELLS", "ALPHA", "BELOW", "LOG_K", "GRAD", "BY_SCALE"], {}),
}


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", list(KERNELS))
def test_compiles_ahead_of_time(name, capability):
    """Compilation finds type errors that the interpreter accepts."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hf_unigd.kernels import triton_kernels

    kernel = getattr(triton_kernels, name)
    tensors, switches = KERNELS[name]
    for dtype in ("fp32", "fp64"):
        for keep in switches.get("KEEP", [None]):
            signature = {t: f"*{dtype}" if t in ("CELLS", "GRAD") else "*fp64" for t in tensors}
            signature |= dict.fromkeys(["OFFSETS", "GROUPS", "LENGTHS"], "*i64")
            signature |= {"SCALE": f"*{dtype}", "columns": "i32"}
            constants = {"W": 32, "GAUSSIAN": True, "PER_PAIR": True, "FAST": dtype == "fp32"}
            constants |= {} if keep is None else {"KEEP": keep}
            signature |= dict.fromkeys(constants, "constexpr")
            source = ASTSource(kernel, signature=signature, constexprs=constants)
            binary = triton.compile(
                source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 1, "enable_fp_fusion": True}
            )
            assert f".target sm_{capability}" in binary.asm["ptx"]
            assert len(binary.asm["cubin"]) > 0
            if dtype == "fp32":
                assert "lg2.approx.ftz.f32" in binary.asm["ptx"]
            assert "bar.sync" not in binary.asm["ptx"] and "shfl" not in binary.asm["ptx"]
