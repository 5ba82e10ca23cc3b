"""Mixtures of datasets of different columns: each is parsed by its own, and the examples are mixed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from .dataset import ExampleDataset, Rows
from .example import Example
from .rows import RowParser


@dataclass
class DatasetSource:
    """
    One dataset of a mixture.

    Attributes:
        rows: Rows of any accepted format, map-style or streaming.
        name: Name in errors.
        weight: How often an example is drawn from it, relative to the others. Without any weights, each row of
            map-style datasets is drawn once in each epoch, and streams are drawn equally often.
        image_folder: Folder that its image paths start from and must not leave. By default, that of the training
            arguments.
        instruction: What its anchors are embedded for, in rows without an instruction of their own. Training saves it
            with the processor under `name`. By default, that of the training arguments.
        document_instruction: The same of its positives and negatives, saved under `"NAME document"`.
        interleaved_captions: Whether an image and its `caption` are one sequence, to which there is no answer, as
            Sugar takes COYO.
    """

    rows: Rows
    name: str
    weight: float | None = None
    image_folder: str | None = None
    instruction: str | None = None
    document_instruction: str | None = None
    interleaved_captions: bool = False

    def parser(self, common: RowParser) -> RowParser:
        """The parser of its rows: the one of all datasets, with its own settings."""
        return replace(
            common,
            source=self.name,
            image_folder=self.image_folder or common.image_folder,
            instruction=self.instruction or common.instruction,
            document_instruction=self.document_instruction or common.document_instruction,
            interleaved_captions=self.interleaved_captions,
        )


@dataclass
class DatasetMixture:
    """
    Several datasets to train on or to evaluate together, which [`UniGDTrainer`] takes as a dataset.

    Raises:
        ValueError: there is no dataset, some weights are given and others are not, or they are not positive.
    """

    sources: list[DatasetSource]

    def __post_init__(self):
        weights = [source.weight for source in self.sources if source.weight is not None]
        if not self.sources:
            raise ValueError("A mixture needs at least one dataset.")
        if weights and len(weights) < len(self.sources):
            names = [source.name for source in self.sources if source.weight is None]
            raise ValueError(f"Give every dataset of the mixture a `weight`, or none: {', '.join(names)} has none.")
        if not all(0 < weight < float("inf") for weight in weights):
            raise ValueError(f"The weights of a mixture must be positive numbers, got {weights}.")

    @property
    def weights(self) -> list[float] | None:
        """The weights of all datasets, or None without any."""
        weights = [source.weight for source in self.sources if source.weight is not None]
        return weights or None


class MixedDataset(torch.utils.data.Dataset):
    """
    Several map-style datasets of examples as one, in which those of each dataset follow each other.

    With weights, an epoch has as many examples as all datasets have together, of which each dataset has its share. It
    is read in a random order, and the next epoch goes on where this one stopped, so that all of its rows are used
    equally often.

    Args:
        parts: The datasets.
        weights: How often an example is drawn from each of them, relative to the others. By default, every example is
            drawn once in each epoch.
        seed: Seed of the order.
    """

    def __init__(self, parts: Sequence[ExampleDataset], weights: Sequence[float] | None = None, seed: int = 0):
        self.parts = list(parts)
        self.seed = seed
        self.epoch = 0
        sizes = [len(part) for part in self.parts]
        self.counts = sizes if weights is None else _shares(sum(sizes), weights)

    @property
    def starts(self) -> list[int]:
        """Where each dataset begins, and where the last one ends."""
        return [0, *np.cumsum(self.counts).tolist()]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        for part in self.parts:
            part.set_epoch(epoch)

    def __len__(self) -> int:
        return sum(self.counts)

    def __getitem__(self, place: int) -> Example | None:
        part = int(np.searchsorted(self.starts, place, side="right")) - 1
        return self.parts[part][int(self._places(part, np.array([place - self.starts[part]]))[0])]

    def __iter__(self) -> Iterator[Example]:
        examples = (self[place] for place in range(len(self)))
        return (example for example in examples if example is not None)

    @property
    def lengths(self) -> np.ndarray | None:
        """The length of every example of this epoch in tokens, if the lengths were measured."""
        parts = []
        for part, count in enumerate(self.counts):
            lengths = self.parts[part].lengths
            if lengths is None:
                return None
            parts.append(lengths[self._places(part, np.arange(count))])
        return np.concatenate(parts)

    def _places(self, part: int, places: np.ndarray) -> np.ndarray:
        """Which examples of a dataset are those at `places` of its share in this epoch."""
        size, count = len(self.parts[part]), self.counts[part]
        if count == size:
            return places
        turns, places = np.divmod(self.epoch * count + places, size)
        for turn in np.unique(turns):
            of_turn = turns == turn
            places[of_turn] = _order(self.seed, part, int(turn), size)[places[of_turn]]
        return places


@lru_cache(maxsize=16)
def _order(*state_and_size: int) -> np.ndarray:
    *state, size = state_and_size
    return np.random.default_rng(state).permutation(np.arange(size, dtype=np.min_scalar_type(size)))


def _shares(total: int, weights: Sequence[float]) -> list[int]:
    """Divides a number in proportion to weights: the largest remainders are rounded up."""
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder: Any = sorted(range(len(weights)), key=lambda place: shares[place] - exact[place])
    for place in by_remainder[: total - sum(shares)]:
        shares[place] += 1
    return shares
