"""The rules of mining: each as it is defined, and all as sentence-transformers applies them."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers.util import mine_hard_negatives

from hf_unigd.retrieval.negative_rules import NegativeRules


ROWS, WIDTH = 12, 16
SETTINGS = [
    {},
    {"num_negatives": 5},
    {"range_min": 2},
    {"range_min": 1, "range_max": 6},
    {"max_score": 0.2},
    {"max_score": 0.3, "min_score": -0.1, "range_max": 9},
    {"absolute_margin": 0.5},
    {"relative_margin": 0.6},
    {"absolute_margin": 0.4, "relative_margin": 0.5, "max_score": 0.35, "range_min": 1, "num_negatives": 2},
    # By default they look at one more, for the positive.
    {"absolute_margin": 0.95, "num_negatives": 2, "range_max": 20},
]


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def embeddings():
    """Anchors, their positives, which are the closest to them, and other documents."""
    generator = np.random.default_rng(0)
    anchors = unit(generator.normal(size=(ROWS, WIDTH)))
    positives = unit(anchors + 0.1 * generator.normal(size=(ROWS, WIDTH)))
    others = unit(generator.normal(size=(20, WIDTH)))
    return [each.astype(np.float32) for each in (anchors, positives, others)]


class Stub:
    """What sentence-transformers mines with: texts are numbers of vectors."""

    device = torch.device("cpu")

    def __init__(self, anchors, documents):
        self.anchors, self.documents = anchors, documents

    def encode_query(self, texts, **_):
        return self.anchors[[int(text.removeprefix("q")) for text in texts]]

    def encode_document(self, texts, **_):
        return self.documents[[int(text.removeprefix("d")) for text in texts]]

    def similarity(self, a, b):
        return torch.as_tensor(a) @ torch.as_tensor(b).T

    def similarity_pairwise(self, a, b):
        return (torch.as_tensor(a) * torch.as_tensor(b)).sum(1)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_rules_are_those_of_sentence_transformers(settings):
    anchors, positives, others = embeddings()
    documents = np.concatenate([positives, others])
    rows = {"query": [f"q{n}" for n in range(ROWS)], "answer": [f"d{n}" for n in range(ROWS)]}
    theirs = mine_hard_negatives(
        Dataset.from_dict(rows),
        Stub(anchors, documents),
        corpus=[f"d{n}" for n in range(ROWS, len(documents))],
        output_format="n-tuple",
        verbose=False,
        **settings,
    )
    rules = NegativeRules(**settings)
    ours = {}
    for row in range(ROWS):
        scores = documents @ anchors[row]
        candidates = [place for place in np.argsort(-scores).tolist() if place != row]
        places, _ = rules.choose(scores[candidates], float(scores[row]), row)
        if len(places) == rules.num_negatives:
            ours[f"q{row}"] = [f"d{candidates[place]}" for place in places]
    names = [f"negative_{n}" for n in range(1, rules.num_negatives + 1)]
    assert ours == {row["query"]: [row[name] for name in names] for row in theirs}
    assert "absolute_margin" not in settings or settings["absolute_margin"] < 0.9 or len(ours) < ROWS


SCORES = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, -0.2], np.float32)


@pytest.mark.parametrize(
    ("settings", "positive", "places"),
    [
        ({}, 0.1, [0, 1]),
        ({"range_min": 3}, 0.1, [3, 4]),
        ({"range_max": 3, "max_score": 0.75}, 0.1, [2]),
        ({"max_score": 0.65}, 0.1, [3, 4]),
        ({"min_score": 0.85}, 0.1, [0]),
        ({"absolute_margin": 0.25}, 0.8, [4, 5]),
        ({"relative_margin": 0.5}, 0.9, [5, 6]),
        ({"relative_margin": 0.5}, -0.1, [7]),  # at most -0.15
        ({"range_min": 1, "max_score": 0.65}, 0.1, [4, 5]),  # counted among those that are left
    ],
)
def test_each_rule_is_what_it_says(settings, positive, places):
    assert NegativeRules(num_negatives=2, **settings).choose(SCORES, positive, 0)[0] == places


def test_what_a_rule_refuses_is_counted_once():
    rules = NegativeRules(num_negatives=1, absolute_margin=0.05, max_score=0.75, min_score=0)
    places, skipped = rules.choose(SCORES, 0.84, 0)
    assert places == [2]
    assert skipped == {"absolute_margin": 2, "relative_margin": 0, "max_score": 0, "min_score": 1}


def test_random_negatives_are_drawn_by_seed_and_row_among_those_that_are_left():
    def drawn(seed, row, count=2):
        rules = NegativeRules(count, max_score=0.75, min_score=0, sampling_strategy="random", seed=seed)
        return rules.choose(SCORES, 0.1, row)[0]

    draws = [tuple(drawn(0, row)) for row in range(200)]
    assert draws == [tuple(drawn(0, row)) for row in range(200)]
    assert draws != [tuple(drawn(1, row)) for row in range(200)]
    assert {place for draw in draws for place in draw} == {2, 3, 4, 5, 6}
    assert all(a < b for a, b in draws)
    assert drawn(0, 0, count=9) == [2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_negatives": 0}, "`num_negatives=0` must be at least 1"),
        ({"range_min": -1}, "`range_min=-1` must be at least 0"),
        ({"range_max": 4, "range_min": 2}, "leaves 2 candidates after `range_min=2`.*`num_negatives=3`"),
        ({"range_max": 2, "range_min": 4}, "leaves 0 candidates"),
        ({"sampling_strategy": "best"}, "`sampling_strategy` must be top or random, got 'best'"),
    ],
)
def test_rules_that_cannot_hold_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        NegativeRules(**settings)
