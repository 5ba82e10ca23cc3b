"""Embedding many sequences in batches."""

from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.lengths import length_batches, sequence_length
from ..modeling import SequenceError, UniGDProcessor


WINDOW = 16


@torch.no_grad()
def embed_sequences(
    model: PreTrainedModel,
    processor: UniGDProcessor,
    sequences: Sequence[Any],
    batch_size: int = 32,
    truncate_dim: int | None = None,
    show_progress: bool = True,
    prompt_name: str | None = None,
    instruction: str | None = None,
) -> torch.Tensor:
    """
    Embeddings of texts, images and mixtures of both, in their order. Of each `WINDOW` batches, those of about the same
    length run together, to spare padding.

    Args:
        model: A [`UniGDModel`] or [`UniGDForConditionalGeneration`].
        processor: Its processor.
        sequences: Whatever [`UniGDProcessor.process_sequences`] takes, in a list or anything indexable.
        batch_size: Sequences a forward pass.
        truncate_dim: Matryoshka prefix to keep.
        show_progress: Whether to draw a progress bar.
        prompt_name, instruction: As in [`UniGDProcessor.process_sequences`].

    Returns:
        `torch.FloatTensor` of shape `(len(sequences), embedding_dim)`, on the CPU: unit vectors.

    Raises:
        ValueError: `sequences` is empty, or the processor has no instruction `prompt_name`.
        SequenceError: a sequence cannot be processed, or is longer than the model's context.
    """
    if len(sequences) == 0:
        raise ValueError("There is nothing to embed: `sequences` is empty.")
    model.eval()
    order, embeddings = [], []
    with tqdm(total=len(sequences), desc="Embedding", unit="row", disable=not show_progress) as progress:
        for first in range(0, len(sequences), WINDOW * batch_size):
            # Read once: they may be pictures that are opened here.
            window = [sequences[place] for place in range(first, min(first + WINDOW * batch_size, len(sequences)))]
            lengths = [sequence_length(processor, sequence) for sequence in window]
            for places in length_batches(lengths, batch_size):
                order += [first + place for place in places]
                try:
                    batch = processor.process_sequences(
                        [window[place] for place in places],
                        prompt_name=prompt_name,
                        instruction=instruction,
                        max_length=model.config.context_length,
                    )
                except SequenceError as error:
                    raise SequenceError(first + places[error.index], error.reason) from error
                batch = batch.to(model.device, model.dtype)
                embeddings.append(model.embed(**batch, truncate_dim=truncate_dim).cpu())
                progress.update(len(places))
    return torch.cat(embeddings)[torch.tensor(order).argsort()]
