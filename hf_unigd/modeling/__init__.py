"""The remote code: exactly the files that a Hub repository receives.

Nothing here imports `hf_unigd`; siblings are imported with one dot, since transformers copies the files flat.
"""

import transformers  # noqa: F401 - first of all: its import registers the classes (hf_unigd/registration.py)

from .configuration_unigd import UniGDConfig
from .modeling_unigd import (
    UniGDCausalLMOutput,
    UniGDForConditionalGeneration,
    UniGDHead,
    UniGDModel,
    UniGDModelOutput,
    UniGDPreTrainedModel,
)
from .processing_unigd import SequenceError, UniGDProcessor


__all__ = [
    "SequenceError",
    "UniGDCausalLMOutput",
    "UniGDConfig",
    "UniGDForConditionalGeneration",
    "UniGDHead",
    "UniGDModel",
    "UniGDModelOutput",
    "UniGDPreTrainedModel",
    "UniGDProcessor",
]
