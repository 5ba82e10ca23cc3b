"""Losses over tensors, usable without our trainer. The next-token loss is the model's own (`labels=`)."""

from .info_nce import InfoNCELoss
from .structure import StructureLoss


__all__ = ["InfoNCELoss", "StructureLoss"]
