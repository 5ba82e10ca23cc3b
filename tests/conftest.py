import os
import sys

import pytest
import torch


os.environ["HF_HUB_OFFLINE"] = "1"

from transformers import dynamic_module_utils

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


@pytest.fixture(scope="module")
def modules_cache(tmp_path_factory):
    """A folder of its own for the code of checkpoints, which this process has imported nothing of."""
    with pytest.MonkeyPatch.context() as patch:
        usual = dynamic_module_utils.HF_MODULES_CACHE
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", [path for path in sys.path if path != usual])  # transformers adds the new folder
        _forget_remote_code()
        yield
        _forget_remote_code()


def _forget_remote_code():
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]


@pytest.fixture
def llava():
    """A tiny LLaVA with an embedding head, and its processor."""
    tiny = make_vlm("llava")
    return UniGDForConditionalGeneration.from_vlm(tiny.model), UniGDProcessor(tiny.processor)
