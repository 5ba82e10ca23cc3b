"""Turns rows of any accepted format into examples: sequences to embed, their matches, and texts to predict."""

from .check import ExampleCheck
from .dataset import ExampleDataset, make_examples
from .example import Example, RowError
from .icons import load_icons
from .mixture import DatasetMixture, DatasetSource, MixedDataset
from .rows import RowParser
from .scenes import load_scenes
from .slice_features import SliceFeatures
from .slices import SentenceSplitter
from .sources import load_rows
from .stories import load_stories
from .streams import ExampleStream, IterableExampleDataset, MixedStream
from .teachers import TeacherArguments, Teachers


__all__ = [
    "DatasetMixture",
    "DatasetSource",
    "Example",
    "ExampleCheck",
    "ExampleDataset",
    "ExampleStream",
    "IterableExampleDataset",
    "MixedDataset",
    "MixedStream",
    "RowError",
    "RowParser",
    "SentenceSplitter",
    "SliceFeatures",
    "TeacherArguments",
    "Teachers",
    "load_icons",
    "load_rows",
    "load_scenes",
    "load_stories",
    "make_examples",
]
