"""Checkpoints: loading what was trained, and describing it."""

from .cards import make_model_card
from .loading import load_checkpoint


__all__ = ["load_checkpoint", "make_model_card"]
