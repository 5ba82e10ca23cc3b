"""Checkpoints: loading what was trained, describing, merging and exporting it."""

from .cards import make_model_card
from .export import export_checkpoint
from .loading import load_checkpoint
from .merging import merge_adapter


__all__ = ["export_checkpoint", "load_checkpoint", "make_model_card", "merge_adapter"]
