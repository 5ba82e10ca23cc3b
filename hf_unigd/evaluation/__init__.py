"""Retrieval metrics. Generation is measured by the perplexity that the trainer reports."""

from .retrieval import METRIC_SCRIPT, rank_candidates, retrieval_metrics


__all__ = ["METRIC_SCRIPT", "rank_candidates", "retrieval_metrics"]
