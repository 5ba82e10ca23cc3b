"""A fixed input by whose embedding a model is recognised."""

from collections.abc import Sequence

import torch
from PIL import Image
from transformers import PreTrainedModel

from ..modeling import UniGDProcessor


_TEXT = "a photograph of a red bicycle that leans against a white wall"
_IMAGE = Image.linear_gradient("L").convert("RGB")


@torch.no_grad()
def probe(model: PreTrainedModel, processor: UniGDProcessor, length: int = 8) -> list[float]:
    """First numbers of the embedding of a fixed picture and text."""
    batch = processor.process_sequences([[_IMAGE, _TEXT]]).to(model.device, model.dtype)
    return model.eval().embed(**batch)[0, :length].tolist()


def differs(made: Sequence[float], found: Sequence[float], dtype: torch.dtype) -> bool:
    """Whether two probes are further apart than rounding in `dtype` explains."""
    tolerance = 1e-3 if dtype in (torch.float32, torch.float64) else 2e-2
    return len(made) != len(found) or not torch.allclose(
        torch.tensor(made), torch.tensor(found), rtol=0, atol=tolerance
    )
