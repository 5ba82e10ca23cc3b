"""Embedding many sequences, searching among them, and answering with what was found."""

from .answering import Answer, answer_with_retrieval
from .building import build_index
from .embedding import embed_sequences
from .entries import Hit
from .index import EmbeddingIndex


__all__ = ["Answer", "EmbeddingIndex", "Hit", "answer_with_retrieval", "build_index", "embed_sequences"]
