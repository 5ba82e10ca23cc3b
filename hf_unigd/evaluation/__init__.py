"""Retrieval metrics, figures of retrieval and of alignment. The trainer itself reports perplexity for generation."""

from .retrieval import METRIC_SCRIPT, rank_candidates, retrieval_metrics


__all__ = ["METRIC_SCRIPT", "rank_candidates", "retrieval_metrics"]
