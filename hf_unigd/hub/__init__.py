"""Checkpoints: loading what was trained, and describing it."""

from .cards import make_model_card
from .loading import load_checkpoint
from .runs import make_run_card


__all__ = ["load_checkpoint", "make_model_card", "make_run_card"]
