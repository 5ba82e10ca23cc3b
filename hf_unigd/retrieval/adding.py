"""Adding rows to an index batch by batch, in the workers of an engine that people run already."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Features
from transformers import PreTrainedModel

from ..bulk.batches import Embedder, SequenceBatches
from ..modeling import UniGDProcessor
from ..modeling.images_unigd import MAX_PIXELS
from .description import IndexDescription
from .entries import COLUMNS, ID
from .entry_reading import EntryReader, RowIds, entries_of, entry_parser
from .table import EntryTable, quoted


class RowAdder:
    """
    Adds rows to an index that exists, for engines that hand out batches of rows, such as Ray Data or Spark: an actor
    makes one, and calls [`add`] with each batch. Any number of them may write to one index.

    Args:
        model: The model that made the index. It is in evaluation mode afterwards.
        processor: Its processor.
        uri: The index, which [`build_index`] made of at least one row.
        id_column: Column of the ids.
        image_folder: Folder that image paths start from and must not leave.
        max_image_pixels: The largest width times height of an image.
        skip_bad_rows: Leave bad rows out, each with its reason in the log, instead of raising.
        batch_size: Rows a forward pass.

    Raises:
        ValueError: there is no index, or another model made it.
        ImportError: LanceDB is not installed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: UniGDProcessor,
        uri: str | Path,
        id_column: str,
        *,
        image_folder: str | Path | None = None,
        max_image_pixels: int = MAX_PIXELS,
        skip_bad_rows: bool = False,
        batch_size: int = 32,
    ):
        self._table = EntryTable.open(uri)
        description = IndexDescription.from_metadata(self._table.schema.metadata, self._table.uri)
        description.check_model(model, processor)
        features = Features.from_arrow_schema(self._table.schema.remove_metadata())
        metadata = Features({name: kind for name, kind in features.items() if name not in COLUMNS})
        read = EntryReader(
            entry_parser(processor, image_folder, max_image_pixels),
            RowIds("", id_column),
            metadata,
            metadata,
            description.store_images,
        )
        self._ids = read.ids
        self._prepare = SequenceBatches(processor, read, model.config.context_length, batch_size, skip_bad_rows)
        self._embed = Embedder(model.eval(), description.truncate_dim)

    def add(self, rows: Sequence[Mapping[str, Any]], first: int = 0) -> int:
        """
        Embeds the rows whose ids the index does not have, and adds them in one transaction.

        Args:
            rows: Values by column name, of any accepted format.
            first: Number of the first of them, for errors and the column `row`.

        Returns:
            Number of entries that were added.

        Raises:
            RowError: a row is bad and `skip_bad_rows` is off. None of these rows is added.
        """
        numbered = {self._ids.of(number, row): (number, row) for number, row in enumerate(rows, first)}
        self._table.refresh()
        where = f"{ID} IN ({', '.join(map(quoted, numbered))})"
        for batch in self._table.batches([ID], where) if numbered else ():
            for known in batch[ID].to_pylist():
                del numbered[known]
        results = [self._embed(batch) for batch in self._prepare(iter(numbered.values()))]
        entries = entries_of(results, self._table.schema)
        if len(entries) == 0:
            return 0
        added = self._table.insert(entries)
        self._table.keep_up()
        return added
