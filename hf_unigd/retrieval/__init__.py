"""An index of embeddings: searching it, answering with what was found, and mining negatives from it."""

from ..bulk.sequences import embed_sequences
from .adding import RowAdder
from .answering import Answer, answer_with_retrieval
from .building import build_index
from .entries import Hit
from .index import EmbeddingIndex
from .mining import mine_negatives
from .mining_report import MiningReport


__all__ = [
    "Answer",
    "EmbeddingIndex",
    "Hit",
    "MiningReport",
    "RowAdder",
    "answer_with_retrieval",
    "build_index",
    "embed_sequences",
    "mine_negatives",
]
