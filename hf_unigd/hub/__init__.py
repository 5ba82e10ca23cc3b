"""Checkpoints: loading what was trained, describing, merging and exporting it."""

from .cards import make_model_card
from .export import export_checkpoint
from .loading import load_checkpoint
from .merging import merge_adapter
from .runs import make_run_card


__all__ = ["export_checkpoint", "load_checkpoint", "make_model_card", "make_run_card", "merge_adapter"]
