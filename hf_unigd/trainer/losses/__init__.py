"""Losses that take tensors and work without the trainer. The model itself computes the next-token loss (`labels=`)."""

from .info_nce import InfoNCELoss
from .structure import StructureLoss


__all__ = ["InfoNCELoss", "StructureLoss"]
