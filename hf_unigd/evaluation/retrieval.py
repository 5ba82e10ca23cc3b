"""Retrieval metrics between two sets of embeddings, in both directions."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

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


@dataclass
class Ranking:
    """
    One direction of retrieval between two sets, over the distinct items of both. Items are named by the first row that
    they occur in.

    Attributes:
        queries (`torch.LongTensor` of shape `(num_queries,)`): Row of each distinct query.
        candidates (`torch.LongTensor` of shape `(num_queries, k)`): Rows of the most similar distinct candidates, best
            first.
        relevant (`list[list[int]]`): Rows of the distinct candidates that match each query.
    """

    queries: torch.Tensor
    candidates: torch.Tensor
    relevant: list[list[int]]

    def recall(self, ks: tuple[int, ...]) -> dict[str, float]:
        """`recall_at_k` for each of `ks`: the share of queries with a match among their first k candidates."""
        return recall_metric().compute(predictions=self.candidates.tolist(), references=self.relevant, ks=ks)


def rank_both_ways(
    anchors: torch.Tensor,
    positives: torch.Tensor,
    anchor_keys: torch.Tensor,
    positive_keys: torch.Tensor,
    k: int,
    rank: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor] = rank_candidates,
) -> dict[str, Ranking]:
    """
    Ranks the positives of each anchor, and the anchors of each positive.

    Args:
        anchors, positives, anchor_keys, positive_keys: As in [`retrieval_metrics`].
        k: Number of candidates to keep per query.
        rank: Finds the candidates of queries, as [`rank_candidates`] does.

    Returns:
        `dict[str, Ranking]` with the keys `anchor_to_positive` and `positive_to_anchor`.
    """
    sides = [_first_rows(anchor_keys), _first_rows(positive_keys)]
    rankings = {}
    for name, queries, candidates, (query_of, candidate_of) in (
        ("anchor_to_positive", anchors, positives, sides),
        ("positive_to_anchor", positives, anchors, sides[::-1]),
    ):
        query_rows, candidate_rows = query_of.unique(), candidate_of.unique()
        relevant: dict[int, set[int]] = {row: set() for row in query_rows.tolist()}
        for query, candidate in zip(query_of.tolist(), candidate_of.tolist(), strict=True):
            relevant[query].add(candidate)
        places = rank(queries[query_rows], candidates[candidate_rows], k)
        rankings[name] = Ranking(query_rows, candidate_rows[places], [sorted(rows) for rows in relevant.values()])
    return rankings


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
    return recalls(rank_both_ways(anchors, positives, anchor_keys, positive_keys, max(ks)), ks)


def recalls(rankings: dict[str, Ranking], ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """Recall at each k of the rankings of [`rank_both_ways`], named as in [`retrieval_metrics`]."""
    return {
        f"{name}_{recall}": value for name, ranking in rankings.items() for recall, value in ranking.recall(ks).items()
    }


@cache
def recall_metric():
    """Returns the `evaluate.Metric` of `METRIC_SCRIPT`, which is loaded once."""
    import evaluate  # takes a second, which only a measurement needs

    return evaluate.load(METRIC_SCRIPT)


def _first_rows(keys: torch.Tensor) -> torch.Tensor:
    """Returns, for every row, the index of the first row with the same key."""
    _, ids = torch.unique(keys, return_inverse=True)
    first = torch.full((int(ids.max()) + 1,), len(ids), dtype=torch.long)
    first.scatter_reduce_(0, ids, torch.arange(len(ids)), "amin")
    return first[ids]
