"""What the trainer does to the batches that [`UniGDDataCollator`] makes: count, join, fill up."""

from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

from .arguments import UniGDTrainingArguments


Batch = dict[str, Any]


def count_targets(batch: Batch) -> int:
    """Labelled tokens, each predicted from the token before it."""
    return sum(int((chunk["labels"][:, 1:] != -100).sum()) for chunk in batch["chunks"])


def count_tokens(batch: Batch, with_padding: bool) -> int:
    """Tokens of all chunks, with or without those that fill rows up."""
    name = "input_ids" if with_padding else "attention_mask"
    return sum(chunk[name].numel() if with_padding else int(chunk[name].sum()) for chunk in batch["chunks"])


def check_batch_size(dataset: Dataset, batch_size: int, args: UniGDTrainingArguments) -> None:
    """
    Refuses batches that cannot train.

    Args:
        dataset: The examples.
        batch_size: Rows per batch over all processes.
        args: The training arguments.

    Raises:
        ValueError: a batch has no negatives, or the rows make no batch.
    """
    if args.contrastive_weight and batch_size == 1:
        raise ValueError(
            "A batch of one row has no negatives, so the contrastive loss cannot train. Raise "
            "`per_device_train_batch_size` (`gradient_cache_chunk_size` bounds its memory), or set "
            "`contrastive_weight=0`."
        )
    if isinstance(dataset, IterableDataset):
        return
    rows = len(dataset)  # type: ignore[arg-type]
    if args.dataloader_drop_last and rows < batch_size:
        raise ValueError(
            f"{rows} rows make no batch of {batch_size}, and `dataloader_drop_last` drops the rest. Lower "
            "`per_device_train_batch_size`, or give more rows."
        )
    if args.contrastive_weight and not args.dataloader_drop_last and rows % batch_size == 1:
        raise ValueError(
            f"The last of {rows} rows would be a batch of its own (there are {batch_size} per batch), without "
            "negatives. Set `dataloader_drop_last=True`, or choose another batch size."
        )


def idle_chunk(chunk: Batch) -> Batch:
    """The same forward pass without an effect: nothing embedded, nothing predicted.

    For a process with fewer chunks than others, where all have to take part (FSDP).
    """
    return {**chunk, "spans": chunk["spans"][:0], "labels": torch.full_like(chunk["labels"], -100)}


def idle_batch(batch: Batch) -> Batch:
    """A batch of no rows, in the form of another."""
    idle = {name: value[:0] for name, value in batch.items() if isinstance(value, torch.Tensor)}
    places = {name: value[:0] for name, value in batch["places"].items()}
    return {**idle, "places": places, "chunks": [idle_chunk(batch["chunks"][0])]}


def join_batches(batches: list[Batch]) -> Batch:
    """One batch of the rows of several, in the same chunks."""
    joined: Batch = {"chunks": [chunk for batch in batches for chunk in batch["chunks"]], "places": {}}
    counts = [sum(len(chunk["spans"]) for chunk in batch["chunks"]) for batch in batches]
    for name in batches[0]["places"]:
        joined["places"][name] = _cat([batch["places"][name] for batch in batches], counts)
    for name, value in batches[0].items():
        if isinstance(value, torch.Tensor):
            joined[name] = torch.cat([batch[name] for batch in batches])
    if "structure" in batches[0]:
        parts = [batch["structure"] for batch in batches]
        joined["structure"] = {
            name: torch.cat([part[name] for part in parts])
            if isinstance(value, torch.Tensor)
            else [item for part in parts for item in part[name]]
            for name, value in parts[0].items()
        }
        slices = [len(part["modalities"]) for part in parts]
        joined["structure"]["starts"] = _cat([part["starts"] for part in parts], slices)
    return joined


def _cat(indices: list[torch.Tensor], counts: list[int]) -> torch.Tensor:
    """Indices into several tables of `counts` rows, as indices into all of them one below the other."""
    starts = [sum(counts[:place]) for place in range(len(counts))]
    return torch.cat([part + start for part, start in zip(indices, starts, strict=True)])
