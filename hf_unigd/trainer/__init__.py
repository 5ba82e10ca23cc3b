"""Training with a joint objective: losses, collator, adapters, the trainer and its arguments."""

from .adapters import add_adapter
from .arguments import UniGDModelConfig, UniGDScriptArguments, UniGDTrainingArguments
from .collator import UniGDDataCollator
from .losses import InfoNCELoss
from .trainer import UniGDTrainer


__all__ = [
    "InfoNCELoss",
    "UniGDDataCollator",
    "UniGDModelConfig",
    "UniGDScriptArguments",
    "UniGDTrainer",
    "UniGDTrainingArguments",
    "add_adapter",
]
