"""Shards of image features: written beside the training, by several processes, and whole or not at all."""

import logging
import multiprocessing
import os
import threading
import time

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from hf_unigd.trainer import feature_shards
from hf_unigd.trainer.feature_shards import ShardIndex, ShardWriter, read_images


def key(number, length=4):
    return f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}{number:016x}", length


def image(number):
    return {"pooler_output": torch.full((4, 8), float(number)), "layer.0": torch.arange(4) + number}


def write(folder, numbers, dtype=None):
    writer = ShardWriter(ShardIndex(folder), dtype)
    for number in numbers:
        writer.add(key(number), image(number))
    writer.flush()
    return writer


def read(folder, numbers):
    """The features of the images that the folder holds."""
    index = ShardIndex(folder)
    index.refresh()
    files = {number: index.find(key(number)) for number in numbers}
    return {number: read_images(file, [key(number)], torch.device("cpu"))[0] for number, file in files.items() if file}


def assert_same(found, numbers):
    assert sorted(found) == sorted(numbers)
    for number, features in found.items():
        assert features.keys() == image(number).keys()
        assert all(torch.equal(features[name], tensor) for name, tensor in image(number).items())


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(feature_shards, "SHARD_BYTES", 1000)  # of seven images


def test_many_images_share_a_file_and_all_are_found(tmp_path, small_shards, monkeypatch):
    monkeypatch.setattr(feature_shards, "_MERGE", 7)
    writer = write(tmp_path, range(50))
    assert len(writer.index) == 50 and len(list(tmp_path.iterdir())) == 8
    assert_same(read(tmp_path, range(60)), range(50))
    assert writer.index.knows(key(3)[0]) and not writer.index.knows(key(51)[0])
    assert writer.index.find(key(3, length=5)) is None  # the same image, of which something else was made


def test_two_processes_write_into_one_folder(tmp_path, small_shards):
    processes = [
        multiprocessing.get_context("fork").Process(target=write, args=(tmp_path, range(start, start + 20)))
        for start in (0, 15)
    ]
    index = ShardIndex(tmp_path)
    index.refresh()
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert_same(read(tmp_path, range(40)), range(35))
    assert not index.knows(key(1)[0])
    index._refreshed -= feature_shards.REFRESH_SECONDS
    assert index.knows(key(1)[0])  # what others have written is seen after a minute


def test_training_goes_on_while_a_shard_is_written(tmp_path, small_shards, monkeypatch):
    save_file, may_write = feature_shards.save_file, threading.Event()
    threads = []

    def slowly(*args, **kwargs):
        threads.append(threading.current_thread())
        assert may_write.wait(60)
        save_file(*args, **kwargs)

    monkeypatch.setattr(feature_shards, "save_file", slowly)
    writer = ShardWriter(ShardIndex(tmp_path))
    for number in range(10):  # more than a shard
        writer.add(key(number), image(number))
    assert not list(tmp_path.glob("*.safetensors"))
    assert_same({number: writer.find(key(number)) for number in range(10)}, range(10))
    may_write.set()
    writer.flush()
    assert writer.find(key(1)) is None and threading.main_thread() not in threads
    assert_same(read(tmp_path, range(10)), range(10))


def test_a_full_disk_stops_the_training_and_leaves_whole_shards(tmp_path, small_shards, monkeypatch):
    write(tmp_path, range(6))

    def full(tensors, file, metadata):
        file.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(feature_shards, "save_file", full)
    with pytest.raises(
        OSError, match=r"(?s)could not be written to .*No space left on device.*written before is kept"
    ):
        write(tmp_path, range(6, 40))
    assert [file.suffix for file in tmp_path.iterdir()] == [".safetensors"]
    assert_same(read(tmp_path, range(40)), range(6))


def test_what_a_killed_writer_left_is_not_read_and_is_removed_later(tmp_path, small_shards):
    def killed(tensors, file, metadata):
        file.write_bytes(b"half")
        os._exit(9)

    def run():
        feature_shards.save_file = killed
        write(tmp_path, range(6, 40))

    write(tmp_path, range(6))
    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == 9
    (left,) = tmp_path.glob(".*")
    write(tmp_path, [])
    assert left.exists()  # another process may be writing it
    os.utime(left, times=(time.time() - 4000,) * 2)
    write(tmp_path, [])
    assert not left.exists()
    assert_same(read(tmp_path, range(40)), range(6))


def test_a_truncated_shard_is_left_out_with_a_warning(tmp_path, small_shards, caplog):
    write(tmp_path, range(12))
    first = min(tmp_path.iterdir())
    held = {int(name[16:32], 16) for name in load_file(first)}
    first.write_bytes(first.read_bytes()[:-7])
    with caplog.at_level(logging.WARNING):
        assert_same(read(tmp_path, range(12)), set(range(12)) - held)
    assert f"{first}, which is damaged" in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_smaller_type_is_stored_and_read_as_what_it_was(tmp_path, dtype):
    features = {"pooler_output": torch.randn(4, 8), "ids": torch.arange(4)}
    writer = ShardWriter(ShardIndex(tmp_path), dtype)
    writer.add(key(1), features)
    rounded = {"pooler_output": features["pooler_output"].to(dtype).float(), "ids": features["ids"]}
    waiting = writer.find(key(1))
    writer.flush()
    (file,) = tmp_path.iterdir()
    assert {tensor.dtype for tensor in load_file(file).values()} == {dtype, torch.int64}
    for found in (waiting, read_images(file, [key(1)], torch.device("cpu"))[0]):
        assert all(
            torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in rounded.items()
        )
