"""Datasets that parse rows into examples."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from datasets import Dataset, IterableDataset

from .checking import check_examples
from .example import Example, RowError
from .features import without_decoding
from .formats import check_columns
from .rows import RowParser
from .slice_features import SliceFeatures
from .streams import ExampleStream, IterableExampleDataset


logger = logging.getLogger(__name__)


# What can be indexed and measured, besides streams: a dataset of `datasets` or torch, or a list of rows.
Rows: TypeAlias = Dataset | IterableDataset | torch.utils.data.Dataset | Sequence[Mapping[str, Any]]


class ExampleDataset(torch.utils.data.Dataset):
    """A map-style dataset that parses a row whenever it is read. Row numbers in errors are indices of `rows`.

    Args:
        rows: Rows of any accepted format.
        parser: Turns a row into an [`Example`].
        indices: Indices of the rows to use. By default all rows are used.
        skip_bad_rows: Return None for a bad row and log the reason, instead of raising. The collator drops None.
        slice_features: Precomputed teacher features of the rows' slices, if there are any.
        lengths: Length of every example in tokens, in the order of `indices`, if the lengths were measured.
        check: Raises a [`RowError`] for an example that cannot be used, such as [`ExampleCheck`].

    Raises:
        RowError: on reading a bad row, if `skip_bad_rows` is off.
    """

    def __init__(
        self,
        rows: Any,
        parser: RowParser,
        indices: Sequence[int] | np.ndarray | None = None,
        skip_bad_rows: bool = False,
        slice_features: SliceFeatures | None = None,
        lengths: np.ndarray | None = None,
        check: Callable[[Example], None] | None = None,
    ):
        self.rows = without_decoding(rows)
        self.parser = parser
        self.indices = range(len(rows)) if indices is None else indices
        self.skip_bad_rows = skip_bad_rows
        self.slice_features = slice_features
        self.lengths = lengths
        self.check = check
        self.epoch: int | None = 0

    def set_epoch(self, epoch: int | None) -> None:
        """Sets what is drawn when rows are read, as in [`RowParser`]."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Example]:
        examples = (self[place] for place in range(len(self)))
        return (example for example in examples if example is not None)

    def __getitem__(self, place: int) -> Example | None:
        index = int(self.indices[place])
        try:
            return self.parse(index)
        except RowError as error:
            if not self.skip_bad_rows:
                raise
            logger.warning("Skipped: %s", error)
            return None

    def parse(self, index: int) -> Example:
        """Returns the example of row `index` of `rows`.

        Raises:
            RowError: the row is bad, whether or not `skip_bad_rows` is on.
        """
        try:
            row = self.rows[index]
        except Exception as error:  # of a transform, or of a torch dataset, which may decode images here
            reason = f"cannot be read: {error or type(error).__name__}"
            raise RowError(index, reason, self.parser.source) from error
        example = self.parser(row, index, self.epoch)
        if self.check is not None:
            self.check(example)
        if self.slice_features is not None:
            try:
                example.slice_features = self.slice_features.read_row(index, example.slices)
            except ValueError as error:
                raise RowError(index, f"{error}.", self.parser.source) from error
        return example


def make_examples(
    rows: Rows,
    parser: RowParser,
    skip_bad_rows: bool = False,
    check_rows: str = "text",
    slice_features: SliceFeatures | None = None,
    length_of: Callable[[Example], int] | None = None,
    check: Callable[[Example], None] | None = None,
    num_workers: int = 0,
    shuffle_buffer_size: int = 0,
    seed: int = 0,
) -> ExampleDataset | ExampleStream:
    """Makes a dataset of examples. The rows of a map-style dataset are checked beforehand.

    Args:
        rows: A `datasets` dataset, map-style or streaming, a list of rows, or a torch dataset that returns rows,
            of any accepted format.
        parser: Turns a row into an [`Example`].
        skip_bad_rows: Leave bad rows out and log their reasons and their number, instead of raising.
        check_rows: How much of the rows of a map-style dataset is checked now ([`check_examples`]): `"off"`, `"text"`
            or `"full"`. The rows of a streaming dataset are checked as they come.
        slice_features: Precomputed teacher features of the slices of a map-style dataset.
        length_of: Returns the length of an example. It is called while the rows are checked, so that batches can be
            made of examples of similar lengths.
        check: Raises a [`RowError`] for an example that cannot be used, such as [`ExampleCheck`]. It is called once
            for each row that is checked now. Of rows that are not, the collator finds out.
        num_workers: Number of workers that check the rows.
        shuffle_buffer_size, seed: As in [`IterableExampleDataset`].

    Raises:
        TypeError: `rows` is none of these.
        ValueError: the columns fit no accepted format, no usable row is left, `slice_features` or `length_of` are
            given for a streaming dataset, or `length_of` is given without a check.
        RowError: a row is bad and `skip_bad_rows` is off.
    """
    if isinstance(rows, dict):
        raise TypeError(f"Rows come in the splits {sorted(rows)}: pass one of them, for example dataset['train'].")
    if isinstance(rows, IterableDataset):
        if length_of is not None:
            raise ValueError(
                "`train_sampling_strategy='group_by_length'` sorts rows, which a stream does not allow. Leave it out."
            )
        if rows.column_names is not None:
            check_columns(rows.column_names)
        if slice_features is not None:
            raise ValueError(
                "Slice features are stored by row number, and the rows of a streaming dataset have no numbers. Train "
                "without `slice_features` (the teachers then run during training), or load the rows without streaming."
            )
        return IterableExampleDataset(rows, parser, skip_bad_rows, shuffle_buffer_size, seed)
    is_indexable = isinstance(rows, (Dataset, torch.utils.data.Dataset, Sequence)) and not isinstance(
        rows, (str, torch.utils.data.IterableDataset)
    )
    if not is_indexable:
        raise TypeError(
            "Rows must be a `datasets` dataset, a list of dicts or a map-style torch dataset, got "
            f"{type(rows).__name__}. `hf_unigd.data.load_rows` loads them by name, and "
            "`datasets.IterableDataset.from_generator` makes a stream."
        )
    if len(rows) == 0:  # type: ignore[arg-type]
        raise ValueError("The dataset has no rows.")
    # A transform may return other columns than the stored ones.
    if isinstance(rows, Dataset) and rows.format["type"] != "custom":
        check_columns(rows.column_names)
    examples = ExampleDataset(rows, parser, skip_bad_rows=skip_bad_rows, slice_features=slice_features)
    if check_rows == "off":
        if length_of is not None:
            raise ValueError(
                "`train_sampling_strategy='group_by_length'` needs the lengths that are measured while the rows are "
                "checked. Set `check_rows='text'`, or choose another strategy."
            )
        return examples
    checked = check_examples(examples, check_rows, check, length_of, num_workers)
    examples.indices, examples.lengths = checked.indices, checked.lengths
    return examples
