"""Perplexity of the captions and answers of rows."""

from collections.abc import Iterator, Mapping
from itertools import islice

import numpy as np
import torch
from accelerate.utils import gather_object

from ..bulk import process_state
from ..bulk.sequences import WINDOW
from ..data import RowError
from ..data.example import InputSequence
from ..data.lengths import length_batches, sequence_length
from ..modeling import UniGDForConditionalGeneration
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
    model, processor = embedder.model, embedder.processor
    error: RowError | None = None
    try:
        own = _targets(embedder, reader, skip_bad_rows)
        while window := list(islice(own, WINDOW * embedder.batch_size)):
            lengths = [sequence_length(processor, each.messages, each.target) for _, _, each in window]
            for places in length_batches(lengths, embedder.batch_size):
                chosen = [window[place] for place in places]
                sequences = [each for _, _, each in chosen]
                batch = processor.process_sequences(
                    [each.messages for each in sequences],
                    [each.target for each in sequences],
                    prompted=[each.prompted for each in sequences],
                    label_history=[each.label_history for each in sequences],
                    max_length=model.config.context_length,
                )
                losses = _losses(model, batch.to(model.device, model.dtype))
                found += [
                    (row, number, *loss) for (row, number, _), loss in zip(chosen, losses, strict=True) if loss[1]
                ]
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


def _losses(model: UniGDForConditionalGeneration, batch: Mapping[str, torch.Tensor]) -> list[tuple[float, int]]:
    """The negative log-likelihood of the labelled tokens of each row in nats, and their number."""
    targets = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "spans")}
    hidden_states = model._decode(use_cache=False, **inputs).last_hidden_state
    vocab_size = model.config.get_text_config().vocab_size
    return [
        (
            next_token_loss(states[None], labels[None], model.logits, vocab_size, 1).item(),
            int((labels != IGNORED).sum()),
        )
        for states, labels in zip(hidden_states, targets, strict=True)
    ]


def _targets(
    embedder: ModelEmbedder, reader: RowReader, skip_bad_rows: bool
) -> Iterator[tuple[int, int, InputSequence]]:
    """The sequences of this process's rows that end with a target, each with the number of its row."""
    state = process_state()
    for number in range(state.process_index, len(reader), state.num_processes):
        try:
            examples = reader.read(number)
        except RowError:
            if not skip_bad_rows:
                raise
            continue
        for place, (example, _) in enumerate(examples):
            if example.target is not None or example.label_history:
                yield number, place, example.anchor_sequences(embedder.processor.embedding_position, embedded=False)[0]
