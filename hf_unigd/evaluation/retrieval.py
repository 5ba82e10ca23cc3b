"""Retrieval metrics between two sets of embeddings, in both directions."""

from functools import cache
from pathlib import Path

import evaluate
import torch


METRIC_SCRIPT = str(Path(__file__).parent / "metrics" / "retrieval_recall.py")


def rank_candidates(queries: torch.Tensor, candidates: torch.Tensor, k: int, chunk_size: int = 4096) -> torch.Tensor:
    """Finds the most similar candidates of each query.

    Args:
        queries (`torch.FloatTensor` of shape `(n, d)`): Unit vectors.
        candidates (`torch.FloatTensor` of shape `(m, d)`): Unit vectors.
        k: Number of candidates to keep per query.
        chunk_size: Number of queries that are compared at a time. It bounds the memory.

    Returns:
        `torch.LongTensor` of shape `(n, min(k, m))`: indices of the candidates, best first.
    """
    k = min(k, len(candidates))
    return torch.cat([(chunk @ candidates.T).topk(k).indices for chunk in queries.split(chunk_size)])


def retrieval_metrics(
    anchors: torch.Tensor,
    positives: torch.Tensor,
    anchor_keys: torch.Tensor,
    positive_keys: torch.Tensor,
    ks: tuple[int, ...] = (1, 5, 10),
) -> dict[str, float]:
    """
    Computes the recall at each k from anchors to positives and from positives to anchors.

    Each distinct anchor and each distinct positive counts once, as a query and as a candidate.

    Args:
        anchors, positives (`torch.FloatTensor` of shape `(n, d)`): Unit vectors; row `i` matches row `i`.
        anchor_keys, positive_keys (`torch.LongTensor` of shape `(n,)`): Rows with equal keys are one item: an image
            with five captions is one candidate, and any of the five captions counts as relevant (MTEB's
            `cv_recall_at_k`).
        ks: The values of k.

    Returns:
        Recalls between 0 and 1 by name: `anchor_to_positive_recall_at_1`, ..., `positive_to_anchor_recall_at_1`, ...
    """
    anchors, anchor_ids = _distinct(anchors, anchor_keys)
    positives, positive_ids = _distinct(positives, positive_keys)
    pairs = list(zip(anchor_ids.tolist(), positive_ids.tolist(), strict=True))
    metrics: dict[str, float] = {}
    for name, queries, candidates, matches in (
        ("anchor_to_positive", anchors, positives, pairs),
        ("positive_to_anchor", positives, anchors, [(positive, anchor) for anchor, positive in pairs]),
    ):
        relevant: list[list[int]] = [[] for _ in range(len(queries))]
        for query, candidate in matches:
            relevant[query].append(candidate)
        ranking = rank_candidates(queries, candidates, max(ks)).tolist()
        recalls = recall_metric().compute(predictions=ranking, references=relevant, ks=ks)
        metrics |= {f"{name}_{recall}": value for recall, value in recalls.items()}
    return metrics


@cache
def recall_metric() -> evaluate.Metric:
    """Returns the metric of `METRIC_SCRIPT`, which is loaded once."""
    return evaluate.load(METRIC_SCRIPT)


def _distinct(embeddings, keys):
    """Returns the first embedding of each distinct key, and for every row the index of its key among them."""
    _, ids = torch.unique(keys, return_inverse=True)
    first = torch.full((int(ids.max()) + 1,), len(ids), dtype=torch.long)
    first.scatter_reduce_(0, ids, torch.arange(len(ids)), "amin")
    return embeddings[first], ids
