"""Training with the joint objective: the trainer, its arguments, the collator, the losses and adapters."""

from .adapters import add_adapter
from .arguments import UniGDModelConfig, UniGDTrainingArguments
from .collator import UniGDDataCollator
from .data_arguments import DatasetConfig, UniGDScriptArguments
from .losses import InfoNCELoss, StructureLoss
from .trainer import UniGDTrainer


__all__ = [
    "DatasetConfig",
    "InfoNCELoss",
    "StructureLoss",
    "UniGDDataCollator",
    "UniGDModelConfig",
    "UniGDScriptArguments",
    "UniGDTrainer",
    "UniGDTrainingArguments",
    "add_adapter",
]
