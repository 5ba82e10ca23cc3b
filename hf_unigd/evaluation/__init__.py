"""Retrieval metrics, and figures of retrieval and alignment. The trainer reports the perplexity of generation."""

from .retrieval import METRIC_SCRIPT, Ranking, rank_both_ways, rank_candidates, recalls, retrieval_metrics


__all__ = [
    "METRIC_SCRIPT",
    "Ranking",
    "rank_both_ways",
    "rank_candidates",
    "recalls",
    "retrieval_metrics",
]
