"""Retrieval between two sets of embeddings, both ways."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import evaluate
import torch


METRIC_SCRIPT = str(Path(__file__).parent / "metrics" / "retrieval_recall.py")


def rank_candidates(queries: torch.Tensor, candidates: torch.Tensor, k: int, chunk_size: int = 4096) -> torch.Tensor:
    """Indices `(n, min(k, m))` of the most similar candidates of each query, best first.

    Args:
        queries (`torch.FloatTensor` of shape `(n, d)`): Unit vectors.
        candidates (`torch.FloatTensor` of shape `(m, d)`): Unit vectors.
        k: How many to keep.
        chunk_size: Queries compared at a time, which bounds memory.
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
    anchors: torch.Tensor, positives: torch.Tensor, anchor_keys: torch.Tensor, positive_keys: torch.Tensor, k: int
) -> dict[str, Ranking]:
    """
    Ranks the positives of each anchor, and the anchors of each positive.

    Args:
        anchors, positives, anchor_keys, positive_keys: As in [`retrieval_metrics`].
        k: Number of candidates to keep per query.

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
        places = rank_candidates(queries[query_rows], candidates[candidate_rows], k)
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
    Recall at each k from anchors to positives and back, over distinct anchors and positives.

    Args:
        anchors, positives (`torch.FloatTensor` of shape `(n, d)`): Unit vectors; row `i` matches row `i`.
        anchor_keys, positive_keys (`torch.LongTensor` of shape `(n,)`): Rows with equal keys are one item: an image
            with five captions is one candidate, and any of the five counts (MTEB's `cv_recall_at_k`).
        ks: Cut-offs.

    Returns:
        `anchor_to_positive_recall_at_1`, ..., `positive_to_anchor_recall_at_1`, ...
    """
    return recalls(rank_both_ways(anchors, positives, anchor_keys, positive_keys, max(ks)), ks)


def recalls(rankings: dict[str, Ranking], ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """Recall at each k of the rankings of [`rank_both_ways`], named as in [`retrieval_metrics`]."""
    return {
        f"{name}_{recall}": value for name, ranking in rankings.items() for recall, value in ranking.recall(ks).items()
    }


@cache
def recall_metric():
    return evaluate.load(METRIC_SCRIPT)


def _first_rows(keys: torch.Tensor) -> torch.Tensor:
    """For every row, the first row that has its key."""
    _, ids = torch.unique(keys, return_inverse=True)
    first = torch.full((int(ids.max()) + 1,), len(ids), dtype=torch.long)
    first.scatter_reduce_(0, ids, torch.arange(len(ids)), "amin")
    return first[ids]
