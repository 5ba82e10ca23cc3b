"""An index of embeddings: searching it, and answering with what was found."""

from ..bulk.sequences import embed_sequences
from .answering import Answer, answer_with_retrieval
from .building import build_index
from .entries import Hit
from .index import EmbeddingIndex


__all__ = ["Answer", "EmbeddingIndex", "Hit", "answer_with_retrieval", "build_index", "embed_sequences"]
