"""Datasets that parse rows into examples, and the check of all rows before training starts."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from tqdm.auto import tqdm

from .example import Example, RowError
from .features import without_decoding
from .formats import check_columns
from .rows import RowParser
from .slice_features import SliceFeatures


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
        lengths: Length of every example, in the order of `indices`, if the lengths were measured.
        check: Raises a [`RowError`] for an example that cannot be used, such as [`ExampleCheck`].

    Raises:
        RowError: on reading a bad row, if `skip_bad_rows` is off.
    """

    def __init__(
        self,
        rows: Any,
        parser: RowParser,
        indices: Sequence[int] | None = None,
        skip_bad_rows: bool = False,
        slice_features: SliceFeatures | None = None,
        lengths: Sequence[int] | None = None,
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
        index = self.indices[place]
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
            raise RowError(index, f"cannot be read: {error or type(error).__name__}") from error
        example = self.parser(row, index, self.epoch)
        if self.check is not None:
            self.check(example)
        if self.slice_features is not None:
            try:
                example.slice_features = self.slice_features.read_row(index, example.slices)
            except ValueError as error:
                raise RowError(index, f"{error}.") from error
        return example


class IterableExampleDataset(torch.utils.data.IterableDataset):
    """A streaming dataset that parses rows as they come.

    Args:
        rows: Rows of any accepted format.
        parser: Turns a row into an [`Example`].
        skip_bad_rows: Skip bad rows instead of raising; every reason is logged, with the number skipped so far.
        endless: Start again in the order of the next epoch when the rows are exhausted.
        check: Raises a [`RowError`] for an example that cannot be used, such as [`ExampleCheck`].

    Raises:
        RowError: on reading a bad row, if `skip_bad_rows` is off.
    """

    def __init__(
        self,
        rows: IterableDataset,
        parser: RowParser,
        skip_bad_rows: bool = False,
        endless: bool = False,
        check: Callable[[Example], None] | None = None,
    ):
        self.rows = without_decoding(rows)
        self.parser = parser
        self.skip_bad_rows = skip_bad_rows
        self.endless = endless
        self.check = check
        self.skipped = 0
        self.epoch = 0

    def shard(self, count: int, index: int, endless: bool = False) -> "IterableExampleDataset":
        """Returns the shard `index` of `count` shards. Every row is in exactly one shard.

        `datasets` splits the shard further between the workers of a data loader.
        """
        rows = split_dataset_by_node(self.rows, index, count) if count > 1 else self.rows
        return IterableExampleDataset(rows, self.parser, self.skip_bad_rows, endless, self.check)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[Example]:
        while True:
            is_empty = True
            for example in self._one_pass():
                is_empty = False
                yield example
            if is_empty or not self.endless:
                return
            self.set_epoch(self.epoch + 1)

    def _one_pass(self) -> Iterator[Example]:
        for index, row in enumerate(self.rows):
            try:
                example = self.parser(row, index, self.epoch)
                if self.check is not None:
                    self.check(example)
            except RowError as error:
                if not self.skip_bad_rows:
                    raise
                self.skipped += 1
                logger.warning("Skipped (%d so far): %s", self.skipped, error)
                continue
            yield example


def make_examples(
    rows: Rows | ExampleDataset | IterableExampleDataset,
    parser: RowParser,
    skip_bad_rows: bool = False,
    check_rows: bool = True,
    slice_features: SliceFeatures | None = None,
    length_of: Callable[[Example], int] | None = None,
    check: Callable[[Example], None] | None = None,
) -> ExampleDataset | IterableExampleDataset:
    """Makes a dataset of examples. The rows of a map-style dataset are checked beforehand.

    Args:
        rows: A `datasets` dataset, map-style or streaming, a list of rows, or a torch dataset that returns rows,
            of any accepted format. A dataset of examples is returned as it is.
        parser: Turns a row into an [`Example`].
        skip_bad_rows: Leave bad rows out and log their reasons and their number, instead of raising.
        check_rows: Parse every row of a map-style dataset now. The rows of a streaming dataset are checked as they
            come.
        slice_features: Precomputed teacher features of the slices of a map-style dataset.
        length_of: Returns the length of an example. It is called while the rows are checked, so that batches can be
            made of examples of similar lengths.
        check: Raises a [`RowError`] for an example that cannot be used, such as [`ExampleCheck`]. It is called once
            for each row that is checked now. Rows that are not are checked whenever they are read, if bad ones are
            skipped; otherwise the collator raises.

    Raises:
        TypeError: `rows` is none of these.
        ValueError: the columns fit no accepted format, no usable row is left, `slice_features` or `length_of` are
            given for a streaming dataset, or `length_of` is given without `check_rows`.
        RowError: a row is bad and `skip_bad_rows` is off.
    """
    if isinstance(rows, (ExampleDataset, IterableExampleDataset)):
        return rows
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
        return IterableExampleDataset(rows, parser, skip_bad_rows, check=check if skip_bad_rows else None)
    is_indexable = isinstance(rows, (Dataset, torch.utils.data.Dataset, Sequence)) and not isinstance(
        rows, (str, torch.utils.data.IterableDataset)
    )
    if not is_indexable:
        raise TypeError(
            "Rows must be a `datasets` dataset, a list of dicts or a map-style torch dataset, got "
            f"{type(rows).__name__}. `hf_unigd.data.load_rows` loads them by name, and "
            "`datasets.IterableDataset.from_generator` makes a stream."
        )
    count = len(rows)  # type: ignore[arg-type]
    if count == 0:
        raise ValueError("The dataset has no rows.")
    # A transform may return other columns than the stored ones.
    if isinstance(rows, Dataset) and rows.format["type"] != "custom":
        check_columns(rows.column_names)
    examples = ExampleDataset(rows, parser, skip_bad_rows=skip_bad_rows, slice_features=slice_features, check=check)
    if not check_rows:
        examples.check = check if skip_bad_rows else None
        if length_of is not None:
            raise ValueError(
                "`train_sampling_strategy='group_by_length'` needs the lengths that are measured while the rows are "
                "checked. Set `check_rows=True`, or choose another strategy."
            )
        return examples
    examples.set_epoch(None)  # every caption that an epoch may draw is checked
    good, lengths = [], []
    for index in tqdm(range(count), desc="Checking rows", unit="row"):
        try:
            example = examples.parse(index)
            good.append(index)
            lengths.append(0 if length_of is None else length_of(example))
        except RowError as error:
            if not skip_bad_rows:
                raise
            logger.warning("Skipped: %s", error)
    if len(good) < count:
        logger.warning("Skipped %d of %d rows.", count - len(good), count)
    if not good:
        raise ValueError(f"None of the {count} rows can be used.")
    return ExampleDataset(rows, parser, good, slice_features=slice_features, lengths=lengths)
