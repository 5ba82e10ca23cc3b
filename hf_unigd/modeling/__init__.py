"""The remote code: the files here ending in `_unigd.py` are what a Hub repository receives.

They never import `hf_unigd`, and import each other with one dot, because transformers copies them into one folder.
"""

import transformers  # noqa: F401 - first of all: its import registers the classes (hf_unigd/registration.py)

from .configuration_unigd import UniGDConfig
from .head_unigd import UniGDHead
from .modeling_unigd import (
    UniGDCausalLMOutput,
    UniGDForConditionalGeneration,
    UniGDModel,
    UniGDModelOutput,
    UniGDPreTrainedModel,
)
from .pipeline_unigd import UniGDFeatureExtractionPipeline
from .processing_unigd import SequenceError, UniGDProcessor


__all__ = [
    "SequenceError",
    "UniGDCausalLMOutput",
    "UniGDConfig",
    "UniGDFeatureExtractionPipeline",
    "UniGDForConditionalGeneration",
    "UniGDHead",
    "UniGDModel",
    "UniGDModelOutput",
    "UniGDPreTrainedModel",
    "UniGDProcessor",
]
