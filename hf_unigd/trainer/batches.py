"""Counts, checks, joins and pads the batches that [`UniGDDataCollator`] makes."""

from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

from ..data import MixedDataset
from .arguments import UniGDTrainingArguments


Batch = dict[str, Any]


def count_targets(batch: Batch) -> int:
    """Counts the labelled tokens, each of which is predicted from the token before it."""
    return sum(int((chunk["labels"][:, 1:] != -100).sum()) for chunk in batch["chunks"])


def count_tokens(batch: Batch, with_padding: bool) -> int:
    """Counts the tokens of all chunks, with or without padding."""
    name = "input_ids" if with_padding else "attention_mask"
    return sum(chunk[name].numel() if with_padding else int(chunk[name].sum()) for chunk in batch["chunks"])


def check_batch_size(dataset: Dataset, batch_size: int, args: UniGDTrainingArguments) -> None:
    """
    Checks that the batches can train.

    Args:
        dataset: The examples.
        batch_size: Rows per batch over all processes.
        args: The training arguments.

    Raises:
        ValueError: a batch would have no negatives, or there are fewer rows than a batch.
    """
    if args.contrastive_weight and batch_size == 1:
        raise ValueError(
            "A batch of one row has no negatives, so the contrastive loss cannot train. Raise "
            "`per_device_train_batch_size` (`gradient_cache_chunk_size` limits its memory), or set "
            "`contrastive_weight=0`."
        )
    if isinstance(dataset, IterableDataset):
        return
    if args.batch_by_source and isinstance(dataset, MixedDataset):
        batch_size *= args.gradient_accumulation_steps if args.negatives_across_accumulation else 1
        for part, rows in zip(dataset.parts, dataset.counts, strict=True):
            if rows < batch_size:
                raise ValueError(
                    f"`batch_by_source` fills a batch of {batch_size} from one dataset, but the share of "
                    f"{part.parser.source} is {rows} rows. Lower `per_device_train_batch_size`, give it more weight, "
                    "or leave it out."
                )
        return
    rows = len(dataset)  # type: ignore[arg-type]
    if args.dataloader_drop_last and rows < batch_size:
        raise ValueError(
            f"{rows} rows are fewer than a batch of {batch_size}, and `dataloader_drop_last` drops incomplete "
            "batches. Lower `per_device_train_batch_size`, or add rows."
        )
    if args.contrastive_weight and not args.dataloader_drop_last and rows % batch_size == 1:
        raise ValueError(
            f"The last of {rows} rows would be a batch of its own (with {batch_size} rows per batch) and have no "
            "negatives. Set `dataloader_drop_last=True`, or choose another batch size."
        )


def idle_chunk(chunk: Batch) -> Batch:
    """
    Returns a chunk with the same inputs that embeds and predicts nothing.

    Under FSDP every process takes part in every forward pass, so a process with fewer chunks than others runs these.
    """
    return {**chunk, "spans": chunk["spans"][:0], "labels": torch.full_like(chunk["labels"], -100)}


def idle_batch(batch: Batch) -> Batch:
    """Returns a batch without rows that has the structure of `batch`."""
    idle = {name: value[:0] for name, value in batch.items() if isinstance(value, torch.Tensor)}
    places = {name: value[:0] for name, value in batch["places"].items()}
    return {**idle, "places": places, "chunks": [idle_chunk(batch["chunks"][0])]}


def join_batches(batches: list[Batch]) -> Batch:
    """Joins batches into one, without those that have no rows. The chunks stay as they are."""
    batches = [batch for batch in batches if len(batch["rows"])] or batches[:1]
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
    """Concatenates indices into tables of `counts` rows, as indices into the concatenation of the tables."""
    starts = [sum(counts[:place]) for place in range(len(counts))]
    return torch.cat([part + start for part, start in zip(indices, starts, strict=True)])
