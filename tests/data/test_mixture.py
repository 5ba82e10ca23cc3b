"""Mixtures of map-style datasets of different columns."""

from collections import Counter

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from hf_unigd.data import DatasetMixture, DatasetSource, ExampleDataset, MixedDataset, RowParser


def part(name, rows):
    texts = {"anchor": [f"{name} {n}" for n in range(rows)], "positive": ["match"] * rows}
    return ExampleDataset(Dataset.from_dict(texts), RowParser(len, source=name))


def text_of(example):
    return example.anchor[0]["content"][0]["text"]


def test_without_weights_every_row_is_there_once():
    mixture = MixedDataset([part("a", 5), part("b", 3)])
    assert [text_of(example) for example in mixture] == [f"a {n}" for n in range(5)] + [f"b {n}" for n in range(3)]
    assert mixture.starts == [0, 5, 8]


def test_with_weights_each_dataset_has_its_share_and_goes_on_where_it_stopped():
    mixture = MixedDataset([part("a", 10), part("b", 4)], [1, 3], seed=2)
    assert (len(mixture) == 14 and mixture.counts == [4, 10]) or mixture.counts == [3, 11]
    seen = []
    for epoch in range(20):
        mixture.set_epoch(epoch)
        seen += [text_of(example) for example in mixture]
    for name, rows in (("a", 10), ("b", 4)):
        counts = Counter(text for text in seen if text[0] == name)
        assert len(counts) == rows and max(counts.values()) - min(counts.values()) <= 1
    again = MixedDataset([part("a", 10), part("b", 4)], [1, 3], seed=2)
    again.set_epoch(19)
    assert [text_of(example) for example in again] == seen[-14:]


@given(st.lists(st.tuples(st.integers(1, 30), st.floats(0.01, 100)), min_size=1, max_size=5))
def test_the_shares_add_up_and_are_proportional(parts):
    mixture = MixedDataset([range(rows) for rows, _ in parts], [weight for _, weight in parts])
    total, weights = sum(rows for rows, _ in parts), sum(weight for _, weight in parts)
    assert sum(mixture.counts) == len(mixture) == total
    assert all(
        abs(count - total * weight / weights) < 1 for count, (_, weight) in zip(mixture.counts, parts, strict=True)
    )


def test_lengths_are_those_of_the_examples_of_the_epoch():
    parts = [part("a", 9), part("b", 4)]
    for each, factor in zip(parts, (1, 100), strict=True):
        each.lengths = np.arange(len(each)) * factor
    mixture = MixedDataset(parts, [1, 2], seed=5)
    for epoch in range(3):
        mixture.set_epoch(epoch)
        expected = [
            int(text.split()[1]) * {"a": 1, "b": 100}[text[0]] for text in (text_of(example) for example in mixture)
        ]
        assert mixture.lengths.tolist() == expected
    parts[0].lengths = None
    assert mixture.lengths is None


def test_wrong_weights_are_refused():
    rows = [{"anchor": "a", "positive": "b"}]
    with pytest.raises(ValueError, match="b has none"):
        DatasetMixture([DatasetSource(rows, "a", 1.0), DatasetSource(rows, "b")])
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="positive numbers"):
            DatasetMixture([DatasetSource(rows, "a", weight)])
    with pytest.raises(ValueError, match="at least one"):
        DatasetMixture([])
