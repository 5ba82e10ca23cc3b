"""Retrieval metrics between two sets of embeddings, in both directions."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object


RANKED_TOGETHER = 256  # number of queries that are compared with the candidates at a time
METRIC_SCRIPT = str(Path(__file__).parent / "metrics" / "retrieval_recall.py")


_CHUNK = 2**24  # similarities that are in memory at a time: 64 MiB in float32


def rank_candidates(
    queries: torch.Tensor, candidates: torch.Tensor, k: int, chunk_size: int | None = None
) -> torch.Tensor:
    """
    Finds the most similar candidates of each query. Candidates of equal similarity come in their own order, as in a
    stable sort, so that the ranking does not depend on the size of a chunk.

    Args:
        queries (`torch.FloatTensor` of shape `(n, d)`): Unit vectors.
        candidates (`torch.FloatTensor` of shape `(m, d)`): Unit vectors.
        k: Number of candidates to keep per query.
        chunk_size: Number of queries that are compared at a time. It bounds the memory; by default, so that a chunk
            has 16 million similarities.

    Returns:
        `torch.LongTensor` of shape `(n, min(k, m))`: indices of the candidates, best first.
    """
    k = min(k, len(candidates))
    chunk_size = chunk_size or max(1, _CHUNK // len(candidates))
    return torch.cat([_first(chunk @ candidates.T, k) for chunk in queries.split(chunk_size)])


def _first(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The places of the `k` highest scores of each row, those of equal scores in their order."""
    values, places = scores.topk(min(k + 1, scores.shape[1]))
    places = places[:, :k]
    # `topk` takes any of the scores that equal the last one.
    tied = values[:, k - 1] == values[:, k] if values.shape[1] > k else scores.new_zeros(len(scores), dtype=torch.bool)
    places[tied] = scores[tied].argsort(dim=1, descending=True, stable=True)[:, :k]
    places = places.sort(dim=1).values
    order = scores.gather(1, places).argsort(dim=1, descending=True, stable=True)
    return places.gather(1, order)


def rank_on_processes(queries: torch.Tensor, candidates: torch.Tensor, k: int, device: torch.device) -> torch.Tensor:
    """
    Ranks as [`rank_candidates`] does, on all processes together: each ranks its share of the queries. All processes
    call it with the same arguments, and all receive the whole ranking.

    A share consists of blocks of a fixed size. Products of the same shapes are rounded alike, so the ranking does not
    depend on the number of processes.

    Args:
        queries, candidates, k: As in [`rank_candidates`].
        device: The device of this process, on which it compares.
    """
    state = PartialState()
    candidates = candidates.to(device)
    own = {
        place: rank_candidates(block.to(device), candidates, k).cpu()
        for place, block in enumerate(queries.split(RANKED_TOGETHER))
        if place % state.num_processes == state.process_index
    }
    ranked = {place: ranking for share in gather_object([own]) for place, ranking in share.items()}
    return torch.cat([ranked[place] for place in sorted(ranked)])


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
        return {f"recall_at_{k}": sum(self.hits(k)) / len(self.relevant) for k in ks}

    def hits(self, k: int) -> list[bool]:
        """Whether each query has a match among its first k candidates."""
        first = self.candidates[:, :k].tolist()
        return [not set(places).isdisjoint(relevant) for places, relevant in zip(first, self.relevant, strict=True)]


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
    first = [first_rows(keys) for keys in (anchor_keys, positive_keys)]
    rows, places = zip(*(each.unique(return_inverse=True) for each in first), strict=True)
    rankings = rank_pairs(anchors[rows[0]], positives[rows[1]], torch.stack(places, 1), k, rank)
    for ranking, (queries, candidates) in zip(rankings.values(), (rows, rows[::-1]), strict=True):
        ranking.queries, ranking.candidates = queries[ranking.queries], candidates[ranking.candidates]
        ranking.relevant = [candidates[matches].tolist() for matches in ranking.relevant]
    return rankings


def rank_pairs(
    anchors: torch.Tensor,
    positives: torch.Tensor,
    pairs: torch.Tensor,
    k: int,
    rank: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor] = rank_candidates,
) -> dict[str, Ranking]:
    """
    Ranks distinct positives for each anchor, and distinct anchors for each positive.

    Args:
        anchors (`torch.FloatTensor` of shape `(n, d)`): Unit vectors of the distinct anchors.
        positives (`torch.FloatTensor` of shape `(m, d)`): Unit vectors of the distinct positives.
        pairs (`torch.LongTensor` of shape `(p, 2)`): Places of each anchor and positive that match. Each anchor and
            each positive has a match.
        k, rank: As in [`rank_both_ways`].

    Returns:
        `dict[str, Ranking]` with the keys `anchor_to_positive` and `positive_to_anchor`.
    """
    rankings = {}
    for name, queries, candidates, (query_of, candidate_of) in (
        ("anchor_to_positive", anchors, positives, pairs.T.tolist()),
        ("positive_to_anchor", positives, anchors, pairs.T.tolist()[::-1]),
    ):
        relevant: list[set[int]] = [set() for _ in queries]
        for query, candidate in zip(query_of, candidate_of, strict=True):
            relevant[query].add(candidate)
        rankings[name] = Ranking(
            torch.arange(len(queries)), rank(queries, candidates, k), [sorted(places) for places in relevant]
        )
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
            `cv_recall_at_k`). A caption is an item of its own, as in Karpathy's protocol, so that equal captions of
            two images need different keys: `torch.arange(n)`, or the ids of the data set.
        ks: The values of k.

    Returns:
        Recalls between 0 and 1 by name (`anchor_to_positive_recall_at_1`, ..., `positive_to_anchor_recall_at_1`, ...).
    """
    return recalls(rank_both_ways(anchors, positives, anchor_keys, positive_keys, max(ks)), ks)


def recalls(rankings: dict[str, Ranking], ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """Recall at each k of the rankings of [`rank_both_ways`], named as in [`retrieval_metrics`]."""
    return {
        f"{name}_{recall}": value for name, ranking in rankings.items() for recall, value in ranking.recall(ks).items()
    }


def first_rows(keys: torch.Tensor) -> torch.Tensor:
    """Returns, for every row, the index of the first row with the same key."""
    _, ids = torch.unique(keys, return_inverse=True)
    first = torch.full((int(ids.max()) + 1,), len(ids), dtype=torch.long)
    first.scatter_reduce_(0, ids, torch.arange(len(ids)), "amin")
    return first[ids]
