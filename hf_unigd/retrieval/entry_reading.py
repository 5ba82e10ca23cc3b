"""The entries of rows: read beside the model, and embedded."""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import ClassLabel, Dataset, Features

from ..bulk.batches import Embedded, RowsRead, as_fixed_size_lists, gather_results
from ..data import RowError, RowParser
from ..data.example import Messages
from ..data.images import encoded_image, open_image
from ..modeling import UniGDProcessor
from .entries import EMBEDDING, ID, make_entry


SEQUENCE = "anchor"


def entry_parser(processor: UniGDProcessor, image_folder: str | Path | None, max_image_pixels: int) -> RowParser:
    """Parses rows for an index: captions of any length come along, matches may be missing, images stay encoded."""
    return RowParser(
        len,
        long_caption_max_tokens=sys.maxsize,
        trust_caption_columns=True,
        image_folder=image_folder,
        max_image_pixels=max_image_pixels,
        requires_match=False,
        find_reserved=processor.find_reserved,
        instruction=processor.get_instruction("document"),
        read_image=encoded_image,
    )


@dataclass(frozen=True)
class RowIds:
    """The ids of rows: those of a column, or the name of the dataset and the number of the row."""

    source: str
    column: str | None

    def of(self, number: int, row: Mapping[str, Any]) -> str:
        if self.column is None:
            return f"{self.source}/{number}"
        if row.get(self.column) is None:
            raise RowError(number, f"has no id in the column `{self.column}`.")
        return str(row[self.column])

    def of_all(self, rows: Dataset) -> pa.ChunkedArray:
        """
        Raises:
            RowError: a row has no id.
            ValueError: two rows have the same.
        """
        if self.column is None:
            return pa.chunked_array(
                [pa.array([f"{self.source}/{number}" for number in range(len(rows))], pa.string())]
            )
        values = rows.select_columns([self.column])[self.column]
        ids = [self.of(number, {self.column: value}) for number, value in enumerate(values)]
        if len(set(ids)) < len(ids):
            twice = next(each for each, count in Counter(ids).items() if count > 1)
            places = [number for number, each in enumerate(ids) if each == twice]
            raise ValueError(
                f"Rows {places[0]} and {places[1]} have the same id {twice!r} in `{self.column}`. Choose a column "
                "whose values are unique, or leave `id_column` out."
            )
        return pa.chunked_array([pa.array(ids, pa.string())])


@dataclass
class EntryReader:
    """
    Reads what is embedded of a row, and its entry.

    Attributes:
        parser: Reads the rows, and leaves images encoded.
        ids: Their ids.
        metadata: The columns that the entries keep.
        features: Those of the rows, for the names of classes.
        store_images: Whether the entries keep images.
    """

    parser: RowParser
    ids: RowIds
    metadata: Features
    features: Features
    store_images: bool

    def __call__(self, number: int, row: Mapping[str, Any]) -> tuple[dict[str, Messages], dict[str, Any]]:
        entry, anchor = self.entry(number, row)
        try:
            return {SEQUENCE: self._opened(anchor)}, entry
        except ValueError as error:
            raise RowError(number, f"{error}.") from error

    def entry(self, number: int, row: Mapping[str, Any]) -> tuple[dict[str, Any], Messages]:
        """The entry of a row without its embedding, and its anchor with encoded images."""
        example = self.parser(row, number)
        metadata = {name: self._value(name, row.get(name)) for name in self.metadata}
        return {ID: self.ids.of(number, row), **make_entry(example, self.store_images), **metadata}, example.anchor

    def _value(self, name: str, value: Any) -> Any:
        kind = self.features[name]
        return kind.int2str(value) if isinstance(kind, ClassLabel) and value is not None else value

    def _opened(self, messages: Messages) -> Messages:
        return [{**turn, "content": [self._opened_part(part) for part in turn["content"]]} for turn in messages]

    def _opened_part(self, part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] != "image":
            return part
        return {**part, "image": open_image(part["image"], max_pixels=self.parser.max_image_pixels)}


def entries_of(results: Sequence[Embedded | RowsRead], schema: pa.Schema) -> pa.Table:
    """The entries of rows that are embedded."""
    entries, embeddings = gather_results(results)
    arrays = [
        as_fixed_size_lists(embeddings[SEQUENCE], field.type)
        if field.name == EMBEDDING
        else pa.array([entry.get(field.name) for entry in entries], field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)
