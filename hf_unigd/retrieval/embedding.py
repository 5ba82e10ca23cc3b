"""Embedding many sequences in batches."""

from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..modeling import UniGDProcessor


@torch.no_grad()
def embed_sequences(
    model: PreTrainedModel,
    processor: UniGDProcessor,
    sequences: Sequence[Any],
    batch_size: int = 32,
    truncate_dim: int | None = None,
    show_progress: bool = True,
) -> torch.Tensor:
    """
    Embeddings of texts, images and mixtures of both, in their order.

    Args:
        model: A [`UniGDModel`] or [`UniGDForConditionalGeneration`].
        processor: Its processor.
        sequences: Whatever [`UniGDProcessor.process_sequences`] takes, in a list or anything indexable.
        batch_size: Sequences a forward pass.
        truncate_dim: Matryoshka prefix to keep.
        show_progress: Whether to draw a progress bar.

    Returns:
        `torch.FloatTensor` of shape `(len(sequences), embedding_dim)`, on the CPU: unit vectors.

    Raises:
        ValueError: `sequences` is empty.
        SequenceError: a sequence cannot be processed, or is longer than the model's context.
    """
    model.eval()
    embeddings = []
    with tqdm(total=len(sequences), desc="Embedding", unit="row", disable=not show_progress) as progress:
        for start in range(0, len(sequences), batch_size):
            part = [sequences[place] for place in range(start, min(start + batch_size, len(sequences)))]
            batch = processor.process_sequences(part, max_length=context_length(model)).to(model.device, model.dtype)
            embeddings.append(model.embed(**batch, truncate_dim=truncate_dim).cpu())
            progress.update(len(part))
    if not embeddings:
        raise ValueError("There is nothing to embed: `sequences` is empty.")
    return torch.cat(embeddings)


def context_length(model: PreTrainedModel) -> int | None:
    """Most tokens that the backbone's language model takes; None where its config names no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
