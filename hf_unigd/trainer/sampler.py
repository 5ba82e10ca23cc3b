"""Samplers whose order depends only on a seed and the epoch, so that all processes and a resumed run have the same."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from ..data import ExampleDataset, MixedDataset
from .arguments import UniGDTrainingArguments


class EpochSampler(torch.utils.data.Sampler):
    """
    Args:
        seed: Seed of the order.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        for part in self.parts(np.random.default_rng((self.seed, self.epoch))):
            yield from part.tolist()  # a list of all rows would take 36 bytes a row

    def parts(self, generator: np.random.Generator) -> Iterator[np.ndarray]:
        """Yields the indices of the examples in their order, in parts."""
        raise NotImplementedError


class LengthGroupedSampler(EpochSampler):
    """
    Groups examples of similar lengths as transformers' sampler of this name does: the examples are shuffled, and those
    of some fifty batches at a time are sorted by length. The longest example of all is in the first batch, so that
    memory runs out at once if it does.

    Args:
        dataset: The examples, whose lengths were measured.
        batch_size: Number of examples in a global batch.
        seed: Seed of the order.
    """

    def __init__(self, dataset: ExampleDataset | MixedDataset, batch_size: int, seed: int):
        super().__init__(seed)
        self.dataset = dataset
        self.sorted_together = batch_size * max(1, min(50, len(dataset) // (4 * batch_size)))

    def __len__(self) -> int:
        return len(self.dataset)

    def parts(self, generator):
        lengths: Any = self.dataset.lengths
        order = generator.permutation(np.arange(len(lengths), dtype=np.min_scalar_type(len(lengths))))
        longest = int(lengths[order].argmax())
        order[[0, longest]] = order[[longest, 0]]
        for start in range(0, len(order), self.sorted_together):
            part = order[start : start + self.sorted_together]
            yield part[np.argsort(-lengths[part].astype(np.int64), kind="stable")]


class SourceBatchSampler(EpochSampler):
    """
    Fills each global batch from one dataset of a mixture. What does not fill a batch is left out of the epoch.

    Args:
        starts: Where each dataset begins in the mixture, and where the last one ends.
        batch_size: Number of examples in a global batch.
        seed: Seed of the order.
    """

    def __init__(self, starts: Sequence[int], batch_size: int, seed: int):
        super().__init__(seed)
        self.batch_size = batch_size
        self.ranges = list(pairwise(starts))

    def __len__(self) -> int:
        return sum((last - first) // self.batch_size for first, last in self.ranges) * self.batch_size

    def parts(self, generator):
        batches = []
        for first, last in self.ranges:
            order = generator.permutation(np.arange(first, last, dtype=np.min_scalar_type(self.ranges[-1][1])))
            batches.append(order[: (last - first) // self.batch_size * self.batch_size].reshape(-1, self.batch_size))
        owners = np.repeat(np.arange(len(batches)), [len(each) for each in batches])
        used = [0] * len(batches)
        for owner in generator.permutation(owners):
            yield batches[owner][used[owner]]
            used[owner] += 1


def make_sampler(dataset: Any, args: UniGDTrainingArguments) -> EpochSampler | None:
    """Returns the sampler that the arguments ask for, or None if the examples come in any order."""
    seed = args.seed if args.data_seed is None else args.data_seed
    if args.batch_by_source and isinstance(dataset, MixedDataset):
        together = args.gradient_accumulation_steps if args.negatives_across_accumulation else 1
        return SourceBatchSampler(dataset.starts, args.train_batch_size * args.world_size * together, seed)
    if args.train_sampling_strategy == "group_by_length" and isinstance(dataset, (ExampleDataset, MixedDataset)):
        return LengthGroupedSampler(dataset, args.train_batch_size * args.gradient_accumulation_steps, seed)
    return None
