"""What the trainer does to the batches that [`UniGDDataCollator`] makes: count, join, fill up."""

from typing import Any

import torch


Batch = dict[str, Any]


def count_targets(batch: Batch) -> int:
    """Labelled tokens, each predicted from the token before it."""
    return sum(int((chunk["labels"][:, 1:] != -100).sum()) for chunk in batch["chunks"])


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
