"""Recall, compared with brute force and loaded as an `evaluate` module."""

import evaluate
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_unigd.evaluation import METRIC_SCRIPT, rank_both_ways, rank_candidates, retrieval_metrics


def unit(n, d, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=-1)


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 30), m=st.integers(1, 30), k=st.integers(1, 12), chunk=st.integers(1, 7), seed=st.integers(0, 99)
)
def test_the_ranking_equals_a_full_sort(n, m, k, chunk, seed):
    queries, candidates = unit(n, 6, seed), unit(m, 6, seed + 100)
    expected = (queries @ candidates.T).argsort(dim=1, descending=True)[:, :k]
    assert torch.equal(rank_candidates(queries, candidates, k, chunk_size=chunk), expected)


@settings(max_examples=15, deadline=None)
@given(
    items=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=20), seed=st.integers(0, 99)
)
def test_recall_equals_brute_force_with_several_captions_per_image(items, seed):
    image_of, caption_of = unit(6, 4, seed), unit(6, 4, seed + 100)
    images, captions = (torch.tensor(column) for column in zip(*items, strict=True))
    metrics = retrieval_metrics(image_of[images], caption_of[captions], images, captions, ks=(1, 2))
    for name, vectors, others, pairs in (
        ("anchor_to_positive", image_of, caption_of, set(items)),
        ("positive_to_anchor", caption_of, image_of, {(caption, image) for image, caption in items}),
    ):
        pool = {other for _, other in pairs}
        for k in (1, 2):
            hits = []
            for query in {query for query, _ in pairs}:
                best = sorted(pool, key=lambda other: -float(vectors[query] @ others[other]))[:k]
                hits.append(any((query, other) in pairs for other in best))
            assert metrics[f"{name}_recall_at_{k}"] == pytest.approx(sum(hits) / len(hits))


def test_perfect_and_hopeless_retrieval():
    keys = torch.arange(8)
    perfect = retrieval_metrics(torch.eye(8), torch.eye(8), keys, keys)
    assert set(perfect.values()) == {1.0}
    hopeless = retrieval_metrics(torch.eye(8), torch.eye(8).roll(1, 0), keys, keys, ks=(1,))
    assert set(hopeless.values()) == {0.0}


def test_the_metric_script_loads_with_evaluate():
    metric = evaluate.load(METRIC_SCRIPT)
    result = metric.compute(predictions=[[3, 1, 2], [0, 2, 1]], references=[[1, 9], [1]], ks=[1, 2, 3])
    assert result == {"recall_at_1": 0.0, "recall_at_2": 0.5, "recall_at_3": 1.0}
    with pytest.raises(ValueError, match="Query 1 has no relevant candidate"):
        metric.compute(predictions=[[0], [0]], references=[[0], []])


def test_recalls_are_those_of_the_metric_script():
    images, captions = unit(8, 4, 0), unit(20, 4, 1)
    owners = torch.arange(20) % 8
    rankings = rank_both_ways(images[owners], captions, owners, torch.arange(20), 10)
    for ranking in rankings.values():
        expected = evaluate.load(METRIC_SCRIPT).compute(
            predictions=ranking.candidates.tolist(), references=ranking.relevant, ks=(1, 3)
        )
        assert ranking.recall((1, 3)) == expected


def test_equally_similar_candidates_come_in_their_own_order():
    candidates = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.6, 0.8], [1.0, 0.0], [0.0, 1.0]])
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    for k in range(1, 7):
        expected = [[1, 2, 4, 3, 0, 5][:k], [0, 5, 3, 1, 2, 4][:k]]
        assert rank_candidates(queries, candidates, k).tolist() == expected
