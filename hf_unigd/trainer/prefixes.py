"""Samples the positions of the structure loss: slice ends, each with the prefix of slices before it."""

import random
from dataclasses import dataclass
from typing import Any

import torch

from ..data import Example


@dataclass
class PrefixSampler:
    """
    Samples positions in sequences for [`StructureLoss`].

    The positions of a row depend only on the seed, the row and the epoch, not on how rows are batched or distributed
    over processes.

    Args:
        num_positions: Number of positions per sequence, or all if it has fewer slices. The paper says only "multiple".
        seed: Seed of the positions.
        keep_all: Whether to embed all slices instead of only those at the positions.
    """

    num_positions: int
    seed: int
    keep_all: bool = False

    def __call__(self, examples: list[Example], slice_spans: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        """
        Args:
            examples: Examples with slices.
            slice_spans (`torch.LongTensor` of shape `(num_slices, k)`): One row per slice of the examples, in order.

        Returns:
            The rows of `slice_spans` to embed, and the inputs of [`StructureLoss`] except `embeddings` and
            `modality_columns`. If the examples have no `slice_features`, `slices` takes the place of `features`.
        """
        slices = [part for example in examples for part in example.slices]
        starts, lengths, keys = [], [], []
        first = 0
        for example in examples:
            count = len(example.slices)
            draw = random.Random(f"{self.seed}-{example.epoch}-{example.row}")
            ends = sorted(draw.sample(range(count), min(count, self.num_positions)))
            starts += [first] * len(ends)
            lengths += [end + 1 for end in ends]
            keys += [hash(tuple(part.key for part in example.slices))] * len(ends)
            first += count
        structure: dict[str, Any] = {
            "modalities": torch.tensor([part.modality for part in slices]),
            "starts": torch.tensor(starts),
            "lengths": torch.tensor(lengths),
            "sample_keys": torch.tensor(keys),
        }
        features = [example.slice_features for example in examples if example.slice_features is not None]
        if len(features) == len(examples):
            structure["features"] = torch.cat(features)
        else:
            structure["slices"] = slices
        chosen = structure["starts"] + structure["lengths"] - 1
        return slice_spans if self.keep_all else slice_spans[chosen], structure
