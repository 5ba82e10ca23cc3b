"""Several processes at one index: writers, readers beside them, and writers that die."""

import multiprocessing
import resource
import signal
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from datasets import Features

from hf_unigd.retrieval.entries import entry_schema
from hf_unigd.retrieval.table import EntryTable, vectors_of


WIDTH = 32
SCHEMA = entry_schema(WIDTH, Features({}))
spawned = multiprocessing.get_context("spawn")  # LanceDB does not survive a fork


def make_entries(numbers, text="a cat"):
    vectors = np.eye(WIDTH, dtype=np.float32)[np.array(numbers) % WIDTH]
    return pa.table(
        {
            "id": [f"rows/{number}" for number in numbers],
            "row": list(numbers),
            "sequence": [[{"text": text, "image": None}]] * len(numbers),
            "answer": [[]] * len(numbers),
            "text": [text] * len(numbers),
            "modality": ["text"] * len(numbers),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), WIDTH),
        },
        schema=SCHEMA,
    )


def ids_of(table):
    return [value for batch in table.batches(["id"]) for value in batch["id"].to_pylist()]


def insert(uri, numbers, size, started=None):
    table = EntryTable.open(uri)
    for start in range(0, len(numbers), size):
        table.insert(make_entries(numbers[start : start + size]))
        if started is not None:
            started.set()


def insert_until_full(uri):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        insert(uri, range(100, 5000), 2000)
    except Exception:
        sys.exit(3)


def test_two_writers_of_the_same_rows_double_no_id(tmp_path):
    table = EntryTable.create(tmp_path, SCHEMA)
    writers = [
        spawned.Process(target=insert, args=(str(tmp_path), range(start, start + 300), 20)) for start in (0, 150)
    ]
    for writer in writers:
        writer.start()
    versions = []
    while any(writer.is_alive() for writer in writers):  # a reader sees whole additions
        table.refresh()
        versions.append(len(table))
        time.sleep(0.02)
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert all(count % 10 == 0 for count in versions) and versions == sorted(versions)
    table.refresh()
    assert sorted(ids_of(table)) == sorted(f"rows/{number}" for number in range(450))


def test_a_reader_keeps_its_version_beside_a_writer(tmp_path):
    writer = EntryTable.create(tmp_path, SCHEMA)
    writer.insert(make_entries(range(40)))
    reader = EntryTable.open(tmp_path)
    row_ids = reader.row_ids("row < 40")
    writer.replace(make_entries(range(20), text="a dog"))
    writer.delete("row >= 20 AND row < 30")
    writer.insert(make_entries(range(40, 60)))
    writer.optimize()
    assert len(reader) == 40 and set(reader.take(row_ids, ["text"])["text"].to_pylist()) == {"a cat"}
    reader.refresh()
    assert len(reader) == 50 and reader.count("text = 'a dog'") == 20


def test_a_killed_writer_leaves_whole_additions(tmp_path):
    table = EntryTable.create(tmp_path, SCHEMA)
    started = spawned.Event()
    writer = spawned.Process(target=insert, args=(str(tmp_path), range(100_000), 50, started))
    writer.start()
    assert started.wait(60)
    time.sleep(0.3)
    writer.kill()
    writer.join()
    table.refresh()
    count = len(table)
    assert count % 50 == 0 and 0 < count < 100_000
    assert table.insert(make_entries(range(count + 50))) == 50  # what is there is not added again
    assert sorted(ids_of(table)) == sorted(f"rows/{number}" for number in range(count + 50))


def test_a_full_disk_leaves_the_last_version(tmp_path):
    table = EntryTable.create(tmp_path, SCHEMA)
    table.insert(make_entries(range(100)))
    writer = spawned.Process(target=insert_until_full, args=(str(tmp_path),))
    writer.start()
    writer.join()
    assert writer.exitcode == 3
    reopened = EntryTable.open(tmp_path)
    assert sorted(ids_of(reopened)) == sorted(f"rows/{number}" for number in range(100))
    assert vectors_of(next(reopened.batches(["embedding"]))["embedding"]).shape == (100, WIDTH)
    assert reopened.insert(make_entries(range(110))) == 10


def test_many_small_additions_are_joined(tmp_path):
    table = EntryTable.create(tmp_path, SCHEMA)
    for number in range(70):
        table.insert(make_entries([number]))
    assert table.needs_upkeep()
    table.optimize()
    assert not table.needs_upkeep() and len(table) == 70
    assert len(list(Path(tmp_path, "entries.lance", "data").iterdir())) > 1  # readers of older versions keep theirs
    table.optimize(keep_days=0)
    assert len(list(Path(tmp_path, "entries.lance", "data").iterdir())) == 1


def replace(uri, rounds):
    table = EntryTable.open(uri)
    for number in range(rounds):
        table.replace(make_entries(range(50), text=str(number)))


def test_upkeep_beside_a_process_that_replaces_fails_neither(tmp_path, caplog):
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
    table._table = mock.Mock(optimize=mock.Mock(side_effect=RuntimeError("the disk is full")))
    with pytest.raises(RuntimeError, match="the disk is full"):
        table.optimize()


@pytest.mark.parametrize("where", ["id = 'rows/1'", "row IN (1)"])
def test_filters_count_and_delete(tmp_path, where):
    table = EntryTable.create(tmp_path, SCHEMA)
    table.insert(make_entries(range(5)))
    assert table.count(where) == 1 and table.delete(where) == 1 and table.count() == 4
