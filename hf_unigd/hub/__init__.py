"""Trained checkpoints: loading, examining, describing, merging, exporting and pushing them."""

from ..modeling.digests_unigd import save_digests
from .cards import make_model_card
from .doctor import examine, report
from .export import export_checkpoint
from .findings import Finding
from .loading import load_checkpoint
from .merging import merge_adapter
from .pushing import push_checkpoint


__all__ = [
    "Finding",
    "examine",
    "export_checkpoint",
    "load_checkpoint",
    "make_model_card",
    "merge_adapter",
    "push_checkpoint",
    "report",
    "save_digests",
]
