"""Retrieval metrics. Generation is measured by the perplexity that the trainer reports."""

from .retrieval import METRIC_SCRIPT, Ranking, rank_both_ways, rank_candidates, recalls, retrieval_metrics


__all__ = [
    "METRIC_SCRIPT",
    "Ranking",
    "rank_both_ways",
    "rank_candidates",
    "recalls",
    "retrieval_metrics",
]
