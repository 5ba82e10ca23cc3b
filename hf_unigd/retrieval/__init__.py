"""Embedding many sequences, and searching among them."""

from .embedding import embed_sequences
from .index import EmbeddingIndex


__all__ = ["EmbeddingIndex", "embed_sequences"]
