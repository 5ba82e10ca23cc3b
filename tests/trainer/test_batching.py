"""Which rows share a batch: sharded and resumed streams, and batches of rows of similar lengths."""

import json
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch.utils.data import DataLoader

from hf_unigd import UniGDProcessor
from hf_unigd.data import RowParser, make_examples
from hf_unigd.data.lengths import sequence_length
from tiny_models import FAMILIES, make_image, make_vlm
from trainer_cases import make_rows, make_trainer, stream


def text_of(example):
    return example.anchor[0]["content"][0]["text"]


@pytest.mark.parametrize("shards", [1, 3, 4])
@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_and_workers_together_read_every_row_of_a_stream_once(shards, workers, processes):
    examples = make_examples(stream(shards=shards).shuffle(seed=1, buffer_size=5), RowParser(len))
    seen = []
    for process in range(processes):
        part = examples.shard(processes, process)
        seen += map(text_of, DataLoader(part, batch_size=None, num_workers=workers))
    assert sorted(seen) == sorted(f"question {n}" for n in range(24))


def test_an_endless_stream_has_every_row_once_per_pass_in_a_new_order():
    examples = make_examples(stream().shuffle(seed=1, buffer_size=24), RowParser(len)).shard(1, 0, endless=True)
    iterator = iter(examples)
    passes = [[text_of(next(iterator)) for _ in range(24)] for _ in range(3)]
    assert all(len(set(texts)) == 24 for texts in passes)
    assert passes[0] != passes[1] != passes[2]
    empty = make_examples(stream().filter(lambda row: False), RowParser(len)).shard(1, 0, endless=True)
    assert list(empty) == []


def train_on_stream(folder, rows, stop_at=None, resume_from_checkpoint=None, **settings):
    """Returns the texts of each step, the model, and the numbers of the rows that were parsed. The fifth step reads
    past the end of the first pass of 24 rows."""
    settings = {
        "per_device_train_batch_size": 5,
        "max_steps": 10,
        "save_strategy": "steps",
        "save_steps": 3,
        **settings,
    }
    trainer = make_trainer(folder, rows, **settings)
    seen, parsed = [], []
    step, parser = trainer.training_step, trainer.train_dataset.parser
    trainer.train_dataset.parser = lambda row, index, epoch: parsed.append(index) or parser(row, index, epoch)

    def record(model, inputs, *args):
        if trainer.state.global_step == stop_at:
            raise KeyboardInterrupt
        seen.append(trainer.processing_class.batch_decode(inputs["chunks"][0]["input_ids"]))
        return step(model, inputs, *args)

    trainer.training_step = record
    if stop_at is None:
        trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    else:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    return seen, trainer.model, parsed


@pytest.mark.parametrize("own_buffer", [False, True])
def test_a_resumed_stream_continues_where_it_stopped_in_its_second_pass(tmp_path, own_buffer, caplog):
    def rows():
        return stream().shuffle(seed=3, buffer_size=9) if own_buffer else stream()

    settings = {"shuffle_buffer_size": 0 if own_buffer else 7, "gradient_accumulation_steps": 2, "max_steps": 5}
    settings |= {"save_steps": 2}
    whole, model, _ = train_on_stream(tmp_path / "whole", rows(), **settings)
    train_on_stream(tmp_path / "parts", rows(), stop_at=3, **settings)
    rest, resumed, parsed = train_on_stream(tmp_path / "parts", rows(), resume_from_checkpoint=True, **settings)
    assert rest == whole[4:]
    for (name, expected), value in zip(model.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(expected, value), name
    # Six batches are used, and the loader reads one ahead. Without a position, four are read again.
    assert len(parsed) == 5 * (6 + 1 + (4 if own_buffer else 0))
    assert ("has no position of the stream" in caplog.text) == own_buffer


def test_a_stream_that_is_resumed_with_other_settings_is_read_again(tmp_path, caplog):
    train_on_stream(tmp_path, stream(), stop_at=5)
    *_, parsed = train_on_stream(
        tmp_path, stream(), resume_from_checkpoint=True, max_steps=5, shuffle_buffer_size=3, ignore_data_skip=False
    )
    assert len(parsed) == 5 * 6 and "shuffle_buffer_size was 1000" in caplog.text


def test_a_step_whose_loss_is_not_finite_is_read_again(tmp_path):
    trainer = make_trainer(tmp_path, stream(), max_steps=4)
    seen, step = [], trainer.compute_loss

    def fail_once(model, inputs, **kwargs):
        seen.append(trainer.processing_class.batch_decode(inputs["chunks"][0]["input_ids"]))
        loss = step(model, inputs, **kwargs)
        return loss * float("nan") if len(seen) == 3 else loss

    trainer.compute_loss = fail_once
    with pytest.raises(FloatingPointError, match="checkpoint-2"):
        trainer.train()
    resumed = make_trainer(tmp_path, stream(), max_steps=4)
    resumed.compute_loss = fail_once
    resumed.train(resume_from_checkpoint=True)
    assert seen[3] == seen[2] and len(seen) == 5


@pytest.mark.parametrize("buffer_size", [0, 1000])
def test_streams_are_shuffled_in_another_order_each_epoch(tmp_path, buffer_size):
    settings = {"per_device_train_batch_size": 4, "max_steps": 12, "shuffle_buffer_size": buffer_size}
    trainer = make_trainer(tmp_path, stream(), **settings)
    loader = iter(trainer.get_train_dataloader())
    batches = [next(loader)["chunks"][0]["input_ids"] for _ in range(12)]
    texts = [text for ids in batches for text in trainer.processing_class.batch_decode(ids, skip_special_tokens=True)]
    first, second = (
        [int(re.search(r"question ?(\d+)", text).group(1)) for text in texts[i : i + 24]] for i in (0, 24)
    )
    assert sorted(first) == sorted(second) == list(range(24))
    if buffer_size:
        assert first != list(range(24)) and second != first
    else:
        assert first == second == list(range(24))


STREAM_OF_A_PROCESS = """
import json, sys
sys.path[:0] = {path!r}
from trainer_cases import make_trainer, stream
trainer = make_trainer("out", stream(), per_device_train_batch_size=4, max_steps=3, ddp_backend="gloo")
loader = iter(trainer.get_train_dataloader())
batches = [next(loader)["chunks"][0]["input_ids"] for _ in range(3)]
seen = [text for ids in batches for text in trainer.processing_class.batch_decode(ids)]
with open(f"rows-{{trainer.args.process_index}}.json", "w") as file:
    json.dump(seen, file)
"""


def test_two_processes_read_different_rows_of_a_stream(tmp_path):
    here = Path(__file__).parent
    (tmp_path / "read.py").write_text(STREAM_OF_A_PROCESS.format(path=[str(here), str(here.parent)]))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "read.py"]
    subprocess.run(launcher, cwd=tmp_path, check=True, capture_output=True)
    parts = [json.loads((tmp_path / f"rows-{process}.json").read_text()) for process in range(2)]
    assert [len(part) for part in parts] == [12, 12]
    numbers = [re.search(r"question ?(\d+)", text).group(1) for part in parts for text in part]
    assert len(set(numbers)) == 24


def test_the_order_by_length_depends_on_the_epoch_of_a_resumed_run(tmp_path):
    """On several processes, accelerate's own `set_epoch` does not reach the sampler."""
    trainer = make_trainer(tmp_path, make_rows(32), train_sampling_strategy="group_by_length")
    loader, sampler = trainer.get_train_dataloader(), trainer._get_train_sampler()
    orders = []
    for epoch in (0.0, 1.0, 1.5):
        trainer.state.epoch = epoch
        trainer.callback_handler.train_dataloader = loader
        trainer.callback_handler.on_epoch_begin(trainer.args, trainer.state, trainer.control)
        orders.append(list(sampler))
    assert orders[0] != orders[1] == orders[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_lengths_count_image_tokens_exactly(family):
    processor = UniGDProcessor(make_vlm(family).processor)
    for size in ((16, 16), (64, 20), (20, 64)):
        messages = [{"role": "user", "content": [{"type": "image", "image": make_image(0, size)}]}]
        ids = processor.process_sequences([messages])["input_ids"]
        assert sequence_length(processor, messages) == int((ids == processor.vlm_processor.image_token_id).sum())


def padding(trainer, epoch=0):
    """Returns the rows in order, and the fraction of padding in the tokens of the anchors."""
    loader = trainer.get_train_dataloader()
    loader.set_epoch(epoch)
    rows, kept, total = [], 0, 0
    for batch in loader:
        rows += batch["rows"].tolist()
        kept += int(batch["chunks"][0]["attention_mask"].sum())
        total += batch["chunks"][0]["attention_mask"].numel()
    return rows, 1 - kept / total


def test_grouping_by_length_reduces_padding_for_images_of_unequal_sizes(tmp_path):
    sizes = [(16, 16), (32, 32), (64, 20), (20, 64)]
    rows = make_rows(
        64,
        image=[make_image(place, sizes[place % 4]) for place in range(64)],
        long_caption=["A cat." + " on the grass" * (place % 7) for place in range(64)],
    )
    _, random = padding(make_trainer(tmp_path, rows, family="qwen2_vl"))
    trainer = make_trainer(tmp_path, rows, family="qwen2_vl", train_sampling_strategy="group_by_length")
    order, grouped = padding(trainer)
    assert sorted(order) == list(range(64))
    assert grouped < random / 2, (grouped, random)
    assert padding(trainer)[0] == order != padding(trainer, epoch=1)[0]
    settings = {"family": "qwen2_vl", "gradient_cache_chunk_size": 4, "per_device_train_batch_size": 16}
    chunks = make_trainer(tmp_path, rows, **settings)
    batch = chunks.data_collator([chunks.train_dataset[place] for place in range(16)])
    masks = [chunk["attention_mask"] for chunk in batch["chunks"][:4]]
    widths = [mask.shape[1] for mask in masks]
    assert widths == sorted(widths, reverse=True) and widths[0] > 1.5 * widths[-1]


def test_grouping_by_length_needs_check_rows(tmp_path):
    with pytest.raises(ValueError, match="check_rows='text'"):
        make_trainer(tmp_path, train_sampling_strategy="group_by_length", check_rows="off")


def test_bad_rows_of_a_batch_cost_one_more_try_each(tmp_path, caplog):
    """However many rows are bad, each is collated at most three times: in the batch, alone, and with the good ones."""
    rows = make_rows(16, long_caption=["A cat." + " on the grass" * (90 if place % 2 else 1) for place in range(16)])
    trainer = make_trainer(tmp_path, rows, skip_bad_rows=True, max_length=120, check_rows="off")
    collator, processed = trainer.data_collator, []
    process = collator.processor.process_sequences

    def count(sequences, *args, **kwargs):
        processed.extend(sequences)
        return process(sequences, *args, **kwargs)

    with patch.object(collator.processor, "process_sequences", count):
        batch = collator([trainer.train_dataset[place] for place in range(16)])
    assert batch["rows"].tolist() == list(range(0, 16, 2))
    assert len(processed) <= 3 * 2 * 16
    assert sum("Skipped: Row" in line for line in caplog.messages) == 8
