"""Retrieval metrics, and figures of retrieval and alignment. The trainer reports the perplexity of generation."""

from .retrieval import METRIC_SCRIPT, rank_candidates, retrieval_metrics


__all__ = ["METRIC_SCRIPT", "rank_candidates", "retrieval_metrics"]
