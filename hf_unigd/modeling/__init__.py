"""The remote code: exactly the files that a Hub repository receives.

Nothing here imports `hf_unigd`; siblings are imported with one dot, since transformers copies the files flat.
"""

from .configuration_unigd import UniGDConfig
from .modeling_unigd import (
    UniGDCausalLMOutput,
    UniGDForConditionalGeneration,
    UniGDHead,
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
