import pytest
import torch

from hf_unigd.kernels import compiled


@pytest.fixture(scope="session", autouse=True)
def _warm_up_vector_math():
    """The first vectorised exp and log of a process race in MKL's dispatch and are wrong by 1e-9 (pytorch#188792)."""
    for dtype in (torch.float32, torch.float64):
        one = torch.ones(1, dtype=dtype)
        one.exp(), one.log()


@pytest.fixture(scope="session")
def compiled_backend():
    if not compiled.is_available():
        pytest.skip("no C++ compiler")
