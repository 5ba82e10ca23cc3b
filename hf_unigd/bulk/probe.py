"""Recognises the model that made an index by its probe, the fixed input that checkpoints carry too."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ..modeling import UniGDProcessor
from ..modeling.probe_unigd import make_probe, probe_sequences, rounding_tolerance, significand_bits


def probe(model: PreTrainedModel, processor: UniGDProcessor, length: int = 64) -> list[float]:
    """The first `length` numbers of the embedding of each probe sequence, one after the other. The instructions are
    not part of it: queries may get others, and an index describes that of its documents."""
    embeddings = make_probe(model, processor)["embeddings"][: len(probe_sequences())]
    return embeddings[:, :length].flatten().tolist()


def probes_differ(made: Sequence[float], found: Sequence[float], dtypes: Sequence[str]) -> bool:
    """
    Whether two probes are further apart than rounding explains.

    Args:
        made: The probe that the index was made with.
        found: The probe of the model at hand.
        dtypes: Names of the data types that the two were computed in, such as `"bfloat16"`.
    """
    if len(made) != len(found):
        return True
    before, now = torch.tensor(made), torch.tensor(found)
    tolerance = rounding_tolerance(*(significand_bits(getattr(torch, dtype)) for dtype in dtypes))
    return not (now - before).norm() <= tolerance * before.norm()
