"""Distinct contents that a protocol compares, each embedded once."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch

from .embedders import Embedder, Instructed, embed_on_processes


class Pool(Sequence):
    """Distinct contents of one side of a comparison, whose images are opened when they are read."""

    def __init__(self) -> None:
        self._places: dict[Hashable, int] = {}
        self._read: list[Callable[[], list]] = []

    def add(self, key: Hashable, read: Callable[[], list]) -> int:
        """
        Adds a content, if it is not there.

        Args:
            key: What tells it from others.
            read: Returns its texts and images, in order.

        Returns:
            Its place.
        """
        if key not in self._places:
            self._places[key] = len(self._read)
            self._read.append(read)
        return self._places[key]

    def add_text(self, text: str) -> int:
        """Adds a text, and returns its place."""
        return self.add(text, lambda: [text])

    def __len__(self) -> int:
        return len(self._read)

    def __getitem__(self, place):
        return self._read[place]()

    def embed(self, embedder: Embedder, side: str, show_progress: bool = False) -> torch.Tensor:
        """The embeddings of all contents, of shape `(len(self), d)`, as a `"query"` or a `"document"`."""
        return embed_on_processes(embedder, Instructed(self, embedder.instruction(side)), show_progress)


def similarities(a: torch.Tensor, places_a: Iterable[int], b: torch.Tensor, places_b: Iterable[int]) -> torch.Tensor:
    """Cosine similarity of each of `places_a` of `a` with that of `places_b` of `b`: `(n,)`, float32."""
    first, second = (torch.tensor(list(places), dtype=torch.long) for places in (places_a, places_b))
    return (a[first] * b[second]).sum(1)


def image_key(value: Any, row: int, column: str) -> Hashable:
    """What tells the image of a row from others: its path, or else where it stands."""
    return value if isinstance(value, str) else (row, column)
