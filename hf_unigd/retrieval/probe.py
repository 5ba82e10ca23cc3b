"""Recognising the model that made an index by its probe, the same fixed input that checkpoints carry."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ..modeling import UniGDProcessor
from ..modeling.probe_unigd import make_probe


# Relative distances that rounding may make, on another machine too.
_TOLERANCES = {"bfloat16": 5e-2, "float16": 1e-2}
_FLOAT32_TOLERANCE = 5e-3  # older indexes were probed with TF32, in which GPUs convolve by default


def probe(model: PreTrainedModel, processor: UniGDProcessor, length: int = 64) -> list[float]:
    """First numbers of the embeddings of the probe's first two sequences, which are all that older indexes have."""
    return make_probe(model, processor)["embeddings"][:2, :length].flatten().tolist()


def differs(made: Sequence[float], found: Sequence[float], dtypes: Sequence[str]) -> bool:
    """Whether two probes are further apart, relative to their length, than rounding in either of `dtypes` explains."""
    if len(made) != len(found):
        return True
    before, now = torch.tensor(made), torch.tensor(found)
    tolerance = max(_TOLERANCES.get(dtype, _FLOAT32_TOLERANCE) for dtype in dtypes)
    return not (now - before).norm() <= tolerance * before.norm()
