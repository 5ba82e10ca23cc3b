"""hf-unigd: vision-language models that retrieve and still speak.

Importing the package registers its classes with transformers' Auto classes and nothing more: training, data and
evaluation load on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

from .modeling import UniGDConfig, UniGDForConditionalGeneration, UniGDModel, UniGDProcessor
from .version import __version__


if TYPE_CHECKING:
    from .trainer import UniGDDataCollator, UniGDTrainer, UniGDTrainingArguments

AutoConfig.register("unigd", UniGDConfig)
AutoModel.register(UniGDConfig, UniGDModel)
AutoModelForImageTextToText.register(UniGDConfig, UniGDForConditionalGeneration)
AutoModelForMultimodalLM.register(UniGDConfig, UniGDForConditionalGeneration)
AutoProcessor.register(UniGDConfig, UniGDProcessor)

__all__ = [
    "UniGDConfig",
    "UniGDDataCollator",
    "UniGDForConditionalGeneration",
    "UniGDModel",
    "UniGDProcessor",
    "UniGDTrainer",
    "UniGDTrainingArguments",
    "__version__",
]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".trainer", __name__), name)
