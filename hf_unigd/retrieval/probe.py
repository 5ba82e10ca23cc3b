"""Recognising the model that made an index by its probe, the same fixed input that checkpoints carry."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ..modeling import UniGDProcessor
from ..modeling.probe_unigd import make_probe


def probe(model: PreTrainedModel, processor: UniGDProcessor, length: int = 8) -> list[float]:
    """First numbers of the embeddings of the probe's text and picture."""
    return make_probe(model, processor)["embeddings"][:, :length].flatten().tolist()


def differs(made: Sequence[float], found: Sequence[float], dtype: torch.dtype) -> bool:
    """Whether two probes are further apart than rounding in `dtype` explains."""
    tolerance = 1e-3 if dtype in (torch.float32, torch.float64) else 2e-2
    return len(made) != len(found) or not torch.allclose(
        torch.tensor(made), torch.tensor(found), rtol=0, atol=tolerance
    )
