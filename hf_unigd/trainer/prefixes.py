"""At which slice ends the structure loss looks, and what lies before each."""

import random
from dataclasses import dataclass
from typing import Any

import torch

from ..data import Example


@dataclass
class PrefixSampler:
    """
    Chooses positions in sequences for [`StructureLoss`].

    What is chosen of a row depends on the seed, the row and the epoch alone: not on how rows are batched or spread
    over processes.

    Args:
        num_positions: How many a sequence; all, where it has no more slices. The paper says only "multiple".
        seed: Of the choice.
        keep_all: Whether the embeddings of all slices are needed, not only of those chosen.
    """

    num_positions: int
    seed: int
    keep_all: bool = False

    def __call__(self, examples: list[Example], slice_spans: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        """
        Args:
            examples: A batch, with slices.
            slice_spans (`torch.LongTensor` of shape `(num_slices, 3)`): Spans of all of them.

        Returns:
            The spans to embed, and the inputs of [`StructureLoss`] but for embeddings and modality columns; instead of
            `features` there are the `slices` themselves where the teachers have not seen them yet.
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
