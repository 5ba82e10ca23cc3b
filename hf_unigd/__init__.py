"""hf-unigd: vision-language models that retrieve and still speak.

The import is lazy: each name below loads its module at its first use. The classes are registered with transformers'
Auto classes all the same ([`~hf_unigd.registration`]).
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .registration import register_with_transformers
from .version import __version__


if TYPE_CHECKING:
    from .hub import load_checkpoint
    from .modeling import UniGDConfig, UniGDForConditionalGeneration, UniGDModel, UniGDProcessor
    from .trainer import UniGDDataCollator, UniGDTrainer, UniGDTrainingArguments

__all__ = [
    "UniGDConfig",
    "UniGDDataCollator",
    "UniGDForConditionalGeneration",
    "UniGDModel",
    "UniGDProcessor",
    "UniGDTrainer",
    "UniGDTrainingArguments",
    "__version__",
    "load_checkpoint",
]

_MODULES = {
    "load_checkpoint": "hub",
    "UniGDConfig": "modeling",
    "UniGDForConditionalGeneration": "modeling",
    "UniGDModel": "modeling",
    "UniGDProcessor": "modeling",
    "UniGDDataCollator": "trainer",
    "UniGDTrainer": "trainer",
    "UniGDTrainingArguments": "trainer",
}


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_transformers()
