"""Several processes at one index: writers, readers beside them, and writers that die."""

import resource
import signal
import sys
import time

import pytest

from hf_unigd.retrieval.table import EntryTable, vectors_of
from retrieval.table_cases import SCHEMA, WIDTH, ids_of, insert, make_entries, spawned


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


@pytest.mark.parametrize("where", ["id = 'rows/1'", "row IN (1)"])
def test_filters_count_and_delete(tmp_path, where):
    table = EntryTable.create(tmp_path, SCHEMA)
    table.insert(make_entries(range(5)))
    assert table.count(where) == 1 and table.delete(where) == 1 and table.count() == 4
