"""Upkeep: small additions are joined and indexed, old versions go, and neither readers nor writers notice."""

from datetime import timedelta
from itertools import groupby
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Features
from hypothesis import given
from hypothesis import strategies as st

from hf_unigd.retrieval import EmbeddingIndex
from hf_unigd.retrieval.building import ANN_DEFAULT
from hf_unigd.retrieval.description import IndexDescription
from hf_unigd.retrieval.entries import entry_schema
from hf_unigd.retrieval.table import EntryTable, VersionRemovedError
from hf_unigd.retrieval.upkeep import ENOUGH, TIERS, tier_to_join
from retrieval.table_cases import SCHEMA, WIDTH, ids_of, insert, make_entries, spawned


NOW = timedelta(0)


def data_files(folder):
    return {file.name for file in Path(folder, "entries.lance", "data").iterdir()}


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=8), st.integers(200, 1500))
def test_fragments_stay_few_and_an_entry_is_rewritten_once_a_tier(pattern, additions):
    fragments, written, rewritten = [], 0, 0
    for number in range(additions):
        fragments.append(size := pattern[number % len(pattern)])
        written += size
        if (tier := tier_to_join(fragments)) is not None:
            joined = []
            for small, run in groupby(fragments, lambda size: size < tier):
                run = list(run)
                if small and len(run) > 1:
                    rewritten += sum(run)
                    run = [sum(run)]
                joined += run
            assert len(joined) <= len(fragments) - ENOUGH
            fragments = joined
    assert len(fragments) <= len(TIERS) * ENOUGH + 1
    assert rewritten <= len(TIERS) * written


def test_small_additions_leave_large_fragments_alone(tmp_path):
    table = EntryTable.create(tmp_path, SCHEMA)
    table.insert(make_entries(range(1000)))
    large = data_files(tmp_path)
    for number in range(1000, 1000 + ENOUGH + 1):
        table.insert(make_entries([number]))
        table.keep_up()
    sizes = [fragment.metadata.num_rows for fragment in table._table.to_lance().get_fragments()]
    assert sizes == [1000, ENOUGH + 1]
    table.optimize(below=ENOUGH, keep=NOW)
    assert large < data_files(tmp_path) and len(data_files(tmp_path)) == 2
    table.optimize(keep=NOW)
    assert len(data_files(tmp_path)) == 1 and len(table) == 1000 + ENOUGH + 1


def test_old_versions_stay_for_a_while(tmp_path):
    table = EntryTable.create(tmp_path, SCHEMA)
    for number in range(3):
        table.insert(make_entries([number]))
    reader = EntryTable.open(tmp_path)
    table.optimize()
    assert ids_of(reader) == [f"rows/{number}" for number in range(3)] and len(data_files(tmp_path)) == 4


def indexed(folder, numbers):
    description = IndexDescription("model", None, "float32", [1.0], None, True, None)
    table = EntryTable.create(folder, SCHEMA.with_metadata(description.to_metadata()))
    for number in numbers:
        table.insert(make_entries([number]))
    return table


@pytest.mark.parametrize("has_searched", [False, True])
@pytest.mark.parametrize("where", [None, "row < 100"])
def test_a_search_moves_on_when_its_version_is_removed(tmp_path, caplog, has_searched, where):
    writer = indexed(tmp_path, range(4))
    index = EmbeddingIndex.load(tmp_path)
    query = torch.eye(WIDTH)[2:3]
    if has_searched:  # the vectors are in memory then, but not what the other entries hold
        index.nearest(torch.eye(WIDTH)[3:4], 1)
    writer.insert(make_entries([4]))
    writer.replace(make_entries([2], text="a dog"))
    writer.optimize(keep=NOW)
    ((hit,),) = index.nearest(query, 1, where=where)
    assert hit.id == "rows/2" and hit.text == "a dog" and len(index) == 5
    assert "This search sees the latest version" in caplog.text


def test_rank_moves_on_too(tmp_path):
    writer = indexed(tmp_path, range(4))
    index = EmbeddingIndex.load(tmp_path)
    writer.optimize(keep=NOW)
    ((row_ids, scores),) = index.rank(torch.eye(WIDTH)[1:2], 1)
    assert index.table.take(row_ids, ["id"])["id"].to_pylist() == ["rows/1"] and scores.tolist() == [1.0]


def test_a_version_that_is_removed_is_named(tmp_path):
    writer = indexed(tmp_path, range(4))
    reader = EntryTable.open(tmp_path)
    writer.optimize(keep=NOW)
    for read in (lambda: ids_of(reader), lambda: reader.count("row < 2"), lambda: reader.sample(2)):
        with pytest.raises(VersionRemovedError, match=r"refresh\(\)"):
            read()
    reader.refresh()
    assert len(ids_of(reader)) == 4


@pytest.mark.parametrize("write", ["insert", "replace"])
def test_an_idle_writer_can_write_after_its_version_is_removed(tmp_path, write):
    table = indexed(tmp_path, range(4))
    idle = EntryTable.open(tmp_path)
    table.optimize(keep=NOW)
    getattr(idle, write)(make_entries([4]))
    table.refresh()
    assert sorted(ids_of(table)) == [f"rows/{number}" for number in range(5)]


def test_two_writers_keep_up_at_once(tmp_path):
    table = EntryTable.create(tmp_path, SCHEMA)
    numbers = [range(150), range(150, 300)]
    writers = [spawned.Process(target=insert, args=(str(tmp_path), each, 1)) for each in numbers]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    table.refresh()
    assert sorted(ids_of(table)) == sorted(f"rows/{number}" for number in range(300))
    assert len(table._table.to_lance().get_fragments()) < 2 * ENOUGH


def replace(uri, rounds):
    table = EntryTable.open(uri)
    for number in range(rounds):
        table.replace(make_entries(range(50), text=str(number)))


def test_upkeep_beside_a_process_that_replaces_fails_neither(tmp_path):
    table = EntryTable.create(tmp_path, SCHEMA)
    table.insert(make_entries(range(50)))
    writer = spawned.Process(target=replace, args=(str(tmp_path), 60))
    writer.start()
    while writer.is_alive():
        table.refresh()
        table.optimize()
    writer.join()
    table.refresh()
    assert writer.exitcode == 0 and len(table) == 50 and table.count("text = '59'") == 50


def test_another_error_of_upkeep_is_not_hidden(tmp_path):
    table = EntryTable.create(tmp_path, SCHEMA)
    dataset = mock.Mock()
    dataset.optimize.compact_files.side_effect = OSError("the disk is full")
    table._table = mock.Mock(to_lance=mock.Mock(return_value=dataset))
    with pytest.raises(OSError, match="the disk is full"):
        table.optimize()


def clustered(count, seed):
    """Unit vectors around a few points, so that the nearest of one are hard to tell from the others of its point."""
    generator = np.random.default_rng(seed)
    vectors = np.random.default_rng(0).standard_normal((8, 256))[generator.integers(0, 8, count)]
    vectors = (vectors + 0.8 * generator.standard_normal((count, 256))).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_the_default_approximate_index_finds_the_nearest_and_takes_additions(tmp_path):
    vectors, queries = clustered(4000, 1), clustered(20, 2)
    schema = entry_schema(256, Features({}))
    description = IndexDescription("model", None, "float32", [1.0], None, True, None)
    table = EntryTable.create(tmp_path, schema.with_metadata(description.to_metadata()))

    def add(numbers):
        entries = make_entries(numbers).set_column(
            schema.get_field_index("embedding"),
            schema.field("embedding"),
            pa.FixedSizeListArray.from_arrays(pa.array(vectors[numbers].reshape(-1)), 256),
        )
        table.insert(entries)

    add(np.arange(3000))
    table.index_embeddings(ANN_DEFAULT)
    assert table.ann == ANN_DEFAULT
    add(np.arange(3000, 4000))
    table.optimize()  # the additions are in the index then
    index = EmbeddingIndex.load(tmp_path)
    found = index.nearest(torch.from_numpy(queries), 10)
    expected = np.argsort(-(queries @ vectors.T), axis=1)[:, :10]
    recall = np.mean(
        [len({hit.row for hit in hits} & set(rows)) / 10 for hits, rows in zip(found, expected, strict=True)]
    )
    assert recall >= 0.95
    ranked = index.rank(torch.from_numpy(queries), 10)
    for hits, (row_ids, scores) in zip(found, ranked, strict=True):
        assert index.table.take(row_ids, ["row"])["row"].to_pylist() == [hit.row for hit in hits]
        assert scores.tolist() == pytest.approx([hit.score for hit in hits], abs=1e-6)
