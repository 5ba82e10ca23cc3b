import os

import pytest
import torch


os.environ["HF_HUB_OFFLINE"] = "1"

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from hf_unigd.data import checking
from tiny_models import make_vlm


@pytest.fixture(scope="session", autouse=True)
def _warm_up_vector_math():
    # The first float64 exp/log of a process may be wrong by 1e-9 where threads race to set MKL up (pytorch#188792).
    torch.ones(1, dtype=torch.float64).exp().log()


@pytest.fixture(scope="session", autouse=True)
def _checks_rows_anew(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checking, "CACHE", tmp_path_factory.mktemp("checked_rows"))
        yield


@pytest.fixture
def llava():
    """A tiny LLaVA with an embedding head, and its processor."""
    tiny = make_vlm("llava")
    return UniGDForConditionalGeneration.from_vlm(tiny.model), UniGDProcessor(tiny.processor)
