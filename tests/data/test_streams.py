"""Streams of examples: their order, their shares, and where a resumed run continues."""

import json
from collections import Counter

import pytest
from datasets import Dataset, load_dataset
from torch.utils.data import DataLoader, get_worker_info

from hf_unigd.data import IterableExampleDataset, MixedStream, RowParser
from hf_unigd.data.streams import Skipped


BATCH = 4


def make_stream(rows=40, shards=5, name="a", buffer=6, seed=3):
    texts = {"anchor": [f"{name} {n}" for n in range(rows)], "positive": ["match"] * rows}
    return IterableExampleDataset(
        Dataset.from_dict(texts).to_iterable_dataset(num_shards=shards),
        RowParser(len, source=name),
        shuffle_buffer_size=buffer,
        seed=seed,
    )


def make_mixture(**kwargs):
    streams = [
        make_stream(name="a"),
        make_stream(rows=18, shards=4, name="b"),
        make_stream(rows=7, shards=4, name="c"),
    ]
    return MixedStream(streams, [3, 2, 1], seed=1, **kwargs)


def text_of(example):
    return example.anchor[0]["content"][0]["text"]


def collate(examples):
    """The texts of a batch, its worker, and its position as a checkpoint keeps it."""
    if isinstance(examples[0], Skipped):
        return "skipped"
    info = get_worker_info()
    position = json.loads(json.dumps(examples[-1].position))
    return [text_of(example) for example in examples], 0 if info is None else info.id, position


def read(stream, batches, workers):
    loader = iter(DataLoader(stream, BATCH, num_workers=workers, collate_fn=collate))
    return [next(loader) for _ in range(batches)]


def texts(batches):
    return [batch[0] for batch in batches]


@pytest.mark.parametrize("make", [make_stream, make_mixture])
@pytest.mark.parametrize(("workers", "processes"), [(0, 1), (2, 1), (3, 2)])
def test_a_stream_continues_after_any_batch_where_it_stopped(make, workers, processes):
    """The passes end at different batches, so the stops are in the first, the second and the third of them."""

    def share():
        return make().shard(processes, processes - 1, BATCH, endless=True)

    batches = read(share(), 24, workers)
    whole = texts(batches)
    for stop in (1, 5, 10, 19):  # each goes on from where the one before it went on
        resumed = share()
        resumed.resume(stop, {worker: position for _, worker, position in batches[:stop]})
        rest = read(resumed, 24, workers)[stop:]
        assert texts(rest) == whole[stop:]
        batches[stop:] = rest


def test_a_resumed_stream_parses_no_row_that_was_used():
    stream = make_stream(rows=400, buffer=50)
    (*_, (_, worker, position)) = read(stream.shard(1, 0, BATCH, endless=True), 80, 0)
    resumed = make_stream(rows=400, buffer=50).shard(1, 0, BATCH, endless=True)
    parsed = []
    parser = resumed.parser
    resumed.parser = lambda row, index, epoch: parsed.append(index) or parser(row, index, epoch)
    resumed.resume(80, {worker: position})
    read(resumed, 81, 0)
    assert len(parsed) == BATCH


def test_the_rows_of_parquet_files_continue_too(tmp_path):
    for number in range(3):
        column = [f"{number} {place}" for place in range(10)]
        Dataset.from_dict({"anchor": column, "positive": column}).to_parquet(tmp_path / f"{number}.parquet")

    def share():
        rows = load_dataset("parquet", data_files=str(tmp_path / "*.parquet"), split="train", streaming=True)
        stream = IterableExampleDataset(rows, RowParser(len), shuffle_buffer_size=4, seed=2)
        return stream.shard(1, 0, BATCH, endless=True)

    whole = read(share(), 12, 0)
    resumed = share()
    resumed.resume(6, {0: whole[5][2]})
    assert texts(read(resumed, 12, 0)[6:]) == texts(whole[6:])


def test_each_epoch_has_every_row_once_in_another_order_and_seeds_differ():
    iterator = iter(make_stream().shard(1, 0, endless=True))
    passes = [[text_of(next(iterator)) for _ in range(40)] for _ in range(3)]
    assert all(len(set(texts)) == 40 for texts in passes)
    assert len({tuple(texts) for texts in passes}) == 3
    other = [text_of(example) for example in make_stream(seed=4)]
    assert sorted(other) == sorted(passes[0]) and other != passes[0]
    assert [text_of(example) for example in make_stream()] == passes[0]
    unshuffled = [text_of(example) for example in make_stream(buffer=0)]
    assert unshuffled == [f"a {n}" for n in range(40)]


def test_a_buffer_of_the_users_own_has_no_position():
    """Its rows would be lost, so the trainer reads the rows before again instead."""
    rows = Dataset.from_dict({"anchor": ["a"] * 9, "positive": ["b"] * 9}).to_iterable_dataset()
    stream = IterableExampleDataset(rows.shuffle(buffer_size=5), RowParser(len))
    assert all(example.position is None for example in stream)


def test_a_mixture_draws_by_weight_and_reads_every_stream_evenly():
    iterator = iter(make_mixture().shard(1, 0, endless=True))
    texts = [text_of(next(iterator)) for _ in range(2400)]
    by_stream = Counter(text[0] for text in texts)
    assert [by_stream[name] / 2400 for name in "abc"] == pytest.approx([1 / 2, 1 / 3, 1 / 6], abs=0.03)
    for name, rows in (("a", 40), ("b", 18), ("c", 7)):
        counts = Counter(text for text in texts if text[0] == name)
        assert len(counts) == rows and max(counts.values()) - min(counts.values()) <= 1


def test_an_evaluated_mixture_has_every_row_once_on_any_number_of_processes():
    seen = [text_of(example) for index in range(3) for example in make_mixture().shard(3, index)]
    assert Counter(seen) == Counter(
        f"{name} {n}" for name, rows in (("a", 40), ("b", 18), ("c", 7)) for n in range(rows)
    )


@pytest.mark.parametrize(("workers", "together"), [(0, 1), (2, 1), (2, 2)])
def test_batches_of_one_stream_are_the_same_on_all_processes(workers, together):
    def sources(process):
        share = make_mixture(batches_together=together).shard(2, process, BATCH, endless=True)
        return [{text[0] for text in texts} for texts, *_ in read(share, 40, workers)]

    first, second = sources(0), sources(1)
    assert first == second and all(len(names) == 1 for names in first)
    groups = [first[start : start + together] for start in range(0, 40, together)]
    assert all(group[0] == each for group in groups for each in group)
    assert set().union(*first) == set("abc")


def test_batches_of_one_stream_need_it_on_every_worker():
    mixture = make_mixture(batches_together=1)
    mixture.check_workers(4)
    with pytest.raises(ValueError, match="b has 4 files for 5 workers"):
        mixture.check_workers(5)
    make_mixture().check_workers(5)


def test_a_worker_without_a_file_of_a_stream_draws_from_the_others():
    streams = [make_stream(shards=2, name="a"), make_stream(shards=1, name="b")]
    share = MixedStream(streams, [1, 1]).shard(1, 0, BATCH, endless=True)
    batches = read(share, 20, 2)
    assert {text[0] for texts, worker, _ in batches if worker == 1 for text in texts} == {"a"}
    assert {text[0] for texts, worker, _ in batches if worker == 0 for text in texts} == {"a", "b"}
