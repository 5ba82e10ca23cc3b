"""Perplexity of the captions and answers of rows."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from ..bulk import process_state
from ..bulk.image_features import for_language_model, join_images, split_images
from ..bulk.sequences import WINDOW
from ..data import RowError
from ..data.example import InputSequence, image_key, iter_image_parts
from ..data.lengths import sequence_length
from ..modeling.modeling_unigd import next_token_loss
from .embedders import ModelEmbedder
from .matches import RowReader
from .scores import Scores


IGNORED = -100  # the label of what is not learned


@torch.no_grad()
def perplexity(embedder: ModelEmbedder, reader: RowReader, skip_bad_rows: bool = False) -> Scores | None:
    """
    Computes the perplexity of the targets of rows: long captions, every `caption`, and answers of chats, each after
    what it is trained to follow. If a launcher started several processes, each takes its share of the rows, and all
    call this.

    Args:
        embedder: Its model generates.
        reader: Reads the rows, with a `short_caption_max_tokens` of 0.
        skip_bad_rows: Leave bad rows out instead of stopping.

    Returns:
        For each target, in the order of the rows, the mean negative log-likelihood of its tokens in nats and their
        number. None if no row has a target.

    Raises:
        RowError: a row is bad and `skip_bad_rows` is off.
    """
    found: list[tuple[int, int, float, int]] = []  # row, number of its target, negative log-likelihood, tokens
    error: RowError | None = None
    try:
        own = _targets(embedder, reader, skip_bad_rows)
        while window := list(islice(own, WINDOW * embedder.batch_size)):
            for chosen in _batches(embedder, window):
                losses = _losses(embedder, [each.sequence for each in chosen])
                found += [(each.row, each.number, *loss) for each, loss in zip(chosen, losses, strict=True) if loss[1]]
    except RowError as reason:
        error = reason
    shares = gather_object([(found, error)])
    if errors := [error for _, error in shares if error is not None]:
        raise min(errors, key=lambda each: each.row)
    found = sorted(each for share, _ in shares for each in share)
    if not found:
        return None
    totals, tokens = (np.array([each[place] for each in found], dtype=np.float64) for place in (2, 3))
    groups = np.array([each[0] for each in found])
    return Scores(totals / tokens, tokens, groups, is_perplexity=True)


@dataclass(frozen=True)
class _Target:
    """A sequence that ends with a target: its row, its number there, and the keys of its images."""

    row: int
    number: int
    sequence: InputSequence

    @property
    def images(self) -> tuple[str, ...]:
        return _keys(self.sequence)


def _keys(sequence: InputSequence) -> tuple[str, ...]:
    return tuple(image_key(part) for part in iter_image_parts(sequence.messages))


def _batches(embedder: ModelEmbedder, window: list[_Target]) -> Iterator[list[_Target]]:
    """Batches of about the same length, in which the targets of one image are together."""
    groups: dict[tuple[str, ...] | int, list[_Target]] = {}
    for place, each in enumerate(window):
        groups.setdefault(each.images or place, []).append(each)
    lengths = {
        key: max(sequence_length(embedder.processor, each.sequence.messages, each.sequence.target) for each in group)
        for key, group in groups.items()
    }
    batch: list[_Target] = []
    for key in sorted(groups, key=lambda key: -lengths[key]):
        group = groups[key]
        if len(batch) + len(group) > embedder.batch_size and batch:
            yield batch
            batch = []
        batch += group
        while len(batch) > embedder.batch_size:
            yield batch[: embedder.batch_size]
            batch = batch[embedder.batch_size :]
    if batch:
        yield batch


def _losses(embedder: ModelEmbedder, sequences: list[InputSequence]) -> list[tuple[float, int]]:
    """The negative log-likelihood of the labelled tokens of each sequence in nats, and their number."""
    model = embedder.model
    batch = embedder.processor.process_sequences(
        [each.messages for each in sequences],
        [each.target for each in sequences],
        prompted=[each.prompted for each in sequences],
        label_history=[each.label_history for each in sequences],
        max_length=model.config.context_length,
    ).to(model.device, model.dtype)
    targets = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "spans")}
    features = _shared_features(embedder, sequences)
    if features is not None:
        del inputs["pixel_values"]
        inputs["image_features"] = features
    hidden_states = model._decode(use_cache=False, **inputs).last_hidden_state
    vocab_size = model.config.get_text_config().vocab_size
    return [
        (
            next_token_loss(states[None], labels[None], model.logits, vocab_size, 1).item(),
            int((labels != IGNORED).sum()),
        )
        for states, labels in zip(hidden_states, targets, strict=True)
    ]


def _shared_features(embedder: ModelEmbedder, sequences: list[InputSequence]) -> Any:
    """The output of the vision tower for the images of the sequences, of which each distinct one runs once. None where
    none occurs twice, or a sequence has several: some families see an image otherwise beside others."""
    model, processor = embedder.model, embedder.processor
    keys = [_keys(each) for each in sequences]
    flat = [key for each in keys for key in each]
    if not model.accepts_image_features or len(set(flat)) == len(flat) or any(len(each) > 1 for each in keys):
        return None
    distinct = {
        key: part["image"]
        for each in sequences
        for part in iter_image_parts(each.messages)
        for key in [image_key(part)]
    }
    inputs = processor.process_sequences([[image] for image in distinct.values()], prompted=False, image_lengths=True)
    lengths = inputs.pop("image_lengths").tolist()
    output = for_language_model(model.image_features(**inputs.to(model.device, model.dtype)))
    features = dict(zip(distinct, split_images(output, lengths), strict=True))
    return join_images([features[key] for key in flat])


def _targets(embedder: ModelEmbedder, reader: RowReader, skip_bad_rows: bool) -> Iterator[_Target]:
    """The sequences of this process's rows that end with a target, each with the number of its row."""
    state = process_state()
    for number in range(state.process_index, len(reader), state.num_processes):
        try:
            examples = reader.read(number)
        except RowError:
            if not skip_bad_rows:
                raise
            continue
        for place, example in enumerate(examples):
            if example.target is not None or example.label_history:
                sequence = example.anchor_sequences(embedder.processor.embedding_position, embedded=False)[0]
                yield _Target(number, place, sequence)
