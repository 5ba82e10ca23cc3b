"""From rows of any accepted format to examples: sequences to embed, their matches, and captions to predict."""

from .dataset import ExampleDataset, IterableExampleDataset, make_examples
from .example import Example, RowError
from .icons import load_icons
from .rows import RowParser
from .sources import load_rows


__all__ = [
    "Example",
    "ExampleDataset",
    "IterableExampleDataset",
    "RowError",
    "RowParser",
    "load_icons",
    "load_rows",
    "make_examples",
]
