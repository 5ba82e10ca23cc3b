"""Making an index, and adding to it."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset
from transformers import PreTrainedModel

from ..bulk.batches import Embedder, SequenceBatches
from ..bulk.processes import process_state
from ..bulk.sequences import embed_sequences
from ..bulk.work import OpenedRows, Row, Rows, work_through
from ..data import RowError
from ..data.formats import check_columns
from ..modeling import UniGDProcessor
from ..modeling.images_unigd import MAX_PIXELS
from ..settings import check_positive
from .description import IndexDescription
from .entries import ID, entry_schema, metadata_features
from .entry_reading import EntryReader, RowIds, entries_of, entry_parser
from .index import EmbeddingIndex
from .table import ANN_TYPES, EntryTable, quoted


logger = logging.getLogger(__name__)

# From this number of entries on, `ann="auto"` makes an approximate index.
ANN_ROWS = 1_000_000
ANN_DEFAULT = "IVF_RQ"
_SAMPLE = 16


def build_index(
    model: PreTrainedModel,
    processor: UniGDProcessor,
    rows: Rows,
    uri: str | Path,
    *,
    model_name: str | None = None,
    source: str | None = None,
    id_column: str | None = None,
    metadata_columns: Sequence[str] | None = None,
    replace: bool = False,
    ann: str | None = "auto",
    truncate_dim: int | None = None,
    store_images: bool = True,
    image_folder: str | Path | None = None,
    max_image_pixels: int = MAX_PIXELS,
    skip_bad_rows: bool = False,
    batch_size: int = 32,
    rows_per_part: int = 1000,
    num_workers: int = 0,
    overwrite: bool = False,
    show_progress: bool = True,
) -> EmbeddingIndex:
    """
    Embeds the anchors of a dataset (of a chat, the questions; answers come along) into an index, which is made if it
    is missing. Rows whose ids the index has are not embedded again, so an interrupted run goes on, and other rows are
    added. A row without an `instruction` gets the processor's instruction of a `"document"`. If a launcher started
    several processes, each embeds its share, and all of them call this.

    Args:
        model: Embeds the rows, and later the queries. It is in evaluation mode afterwards.
        processor: Its processor.
        rows: A dataset of any accepted format; answers, captions and matches may be missing. Each process reads all of
            a stream.
        uri: A folder, or an address of an object store that LanceDB opens (`s3://...`, `gs://...`).
        model_name: Hub id or folder to load the model from again; that which `model` was loaded from by default.
        source: Name of the dataset, which ids begin with (`"icons/17"` is row 17 of `icons`); by default the name that
            `datasets` knows it by, otherwise `"rows"`.
        id_column: Column of the ids, which are then those of the rows alone.
        metadata_columns: Columns of single values to keep, for filters; by default all that belong to no row format.
        replace: Embed all rows, and let them take the places of entries with the same ids.
        ann: Type of an approximate index of the embeddings: `"IVF_FLAT"`, `"IVF_HNSW_SQ"`, `"IVF_SQ"`, `"IVF_RQ"`,
            `"IVF_PQ"`, `"IVF_HNSW_PQ"`; None for exact search; `"auto"` for an `IVF_RQ` from a million entries
            on, and for what the index has otherwise.
        truncate_dim: Matryoshka prefix to keep.
        store_images: Whether images are kept, encoded as they are in the source, to be shown and put into prompts.
        image_folder: Folder that image paths start from and must not leave.
        max_image_pixels: The largest width times height of an image.
        skip_bad_rows: Leave bad rows out, each with its reason in the log, instead of stopping.
        batch_size: Rows a forward pass.
        rows_per_part: Rows that are added at once. An interruption costs each process and each worker at most these.
        num_workers: Number of processes that open and process images beside each process.
        overwrite: Throw away the entries that the index has.
        show_progress: Whether to draw a progress bar.

    Raises:
        ValueError: there are no rows, they have no accepted format or are all bad, ids are missing or occur twice, a
            column is unknown, or the index was made by another model, with other settings, or of other rows with the
            same ids.
        RowError: a row is bad and `skip_bad_rows` is off. What was embedded is kept.
        ImportError: LanceDB is not installed.
    """
    check_positive(batch_size=batch_size, rows_per_part=rows_per_part, truncate_dim=truncate_dim)
    if ann not in (None, "auto", *ANN_TYPES):
        raise ValueError(f"`ann` must be one of auto, none, {', '.join(ANN_TYPES)}, got {ann!r}.")
    opened = OpenedRows.of(rows, num_workers)
    metadata = metadata_features(opened.features, metadata_columns, id_column)
    if getattr(rows, "format", {}).get("type") != "custom":  # a transform may make other columns than are stored
        check_columns(opened.features, requires_match=False, kept=[*metadata, *([id_column] if id_column else [])])
    if truncate_dim:  # hours later would be too late to learn that a prefix was not trained
        embed_sequences(model, processor, ["prefix"], truncate_dim=truncate_dim, show_progress=False)
    state = process_state()
    if state.is_main_process:
        description = IndexDescription.of(model, processor, model_name, truncate_dim, store_images)
        schema = entry_schema(truncate_dim or model.config.embedding_dim, metadata)
        _begin(uri, schema, description, model, processor, overwrite)
    state.wait_for_everyone()
    table = EntryTable.open(uri)
    _check_metadata(table.schema, metadata)

    parser = entry_parser(processor, image_folder, max_image_pixels)
    ids = RowIds(source or source_name(rows), id_column)
    read = EntryReader(parser, ids, metadata, opened.features, store_images)
    prepare: Any = SequenceBatches(processor, read, model.config.context_length, batch_size, skip_bad_rows)
    wanted = None
    if not replace:
        known = _known_ids(table)
        if isinstance(opened.rows, IterableDataset):
            prepare = _UnknownRows(prepare, ids, frozenset(known.to_pylist()))
        else:
            found = pc.is_in(ids.of_all(opened.rows), value_set=known).to_numpy(zero_copy_only=False)
            _check_content(table, opened.rows, read, np.flatnonzero(found))
            if found.any() and not found.all():
                logger.warning("Going on: of %d rows, the index has %d.", len(found), found.sum())
            wanted = ~found
    if wanted is None or wanted.any():
        parts = _Inserts(table, replace, upkeep=state.is_main_process)
        work_through(
            opened.rows,
            parts,
            rows_per_part,
            prepare,
            Embedder(model.eval(), truncate_dim),
            lambda results: entries_of(results, table.schema),
            num_workers=num_workers,
            wanted=wanted,
            title="Indexing",
            show_progress=show_progress,
        )
        parts.report()
    if state.is_main_process:
        table.refresh()
        _finish(table, ann)
    state.wait_for_everyone()
    return EmbeddingIndex.load(uri)


def _begin(uri, schema, description, model, processor, overwrite) -> None:
    """Makes the table, or checks that the one that is there is of the same model and settings."""
    if overwrite:
        EntryTable.drop(uri)
    if not EntryTable.exists(uri):
        EntryTable.create(uri, schema.with_metadata(description.to_metadata()))
        return
    table = EntryTable.open(uri)
    made = IndexDescription.from_metadata(table.schema.metadata, table.uri)
    made.check_settings(description)
    made.check_model(model, processor)


def _check_metadata(schema: pa.Schema, metadata: Features) -> None:
    """
    Raises:
        ValueError: the rows have metadata that the index does not have.
    """
    for name, kind in metadata.items():
        known = schema.field(name).type if name in schema.names else None
        if known != kind.pa_type:
            has = "no such column" if known is None else f"one of {known}"
            raise ValueError(
                f"The rows have a column `{name}` of {kind.pa_type}, and the index has {has}. Name the columns to "
                "keep with `metadata_columns`, or start anew with `overwrite`."
            )


def source_name(rows: Rows) -> str:
    """What the ids of rows begin with: the name that `datasets` knows them by."""
    name = rows.info.dataset_name
    return f"{name}/{rows.split}" if name and rows.split else name or "rows"


def _known_ids(table: EntryTable) -> pa.ChunkedArray:
    return pa.chunked_array([batch[ID] for batch in table.batches([ID])], pa.string())


@dataclass
class _UnknownRows:
    """Leaves out the rows of a stream that the index has."""

    prepare: SequenceBatches
    ids: RowIds
    known: frozenset[str]

    def __call__(self, rows: Iterator[Row]) -> Iterator[Any]:
        return self.prepare((number, row) for number, row in rows if self.ids.of(number, row) not in self.known)


def _check_content(table: EntryTable, rows: Dataset, read: EntryReader, known: np.ndarray) -> None:
    """
    Raises:
        ValueError: of a sample of the rows that the index knows, some are others by now.
    """
    sample = known[np.unique(np.linspace(0, max(len(known) - 1, 0), min(len(known), _SAMPLE), dtype=int))]
    now = {}
    for number in sample.tolist():
        with suppress(RowError):  # it was skipped, or its file is gone, while its entry is there
            entry, _ = read.entry(number, rows[number])
            now[entry[ID]] = entry
    if not now:
        return
    where = f"{ID} IN ({', '.join(map(quoted, now))})"
    for batch in table.batches([ID, "sequence", "answer"], where):
        for stored in batch.to_pylist():
            wanted = now[stored[ID]]
            if any(stored[name] != wanted[name] for name in ("sequence", "answer")):
                raise ValueError(
                    f"Row {wanted['row']} is another one than the index has with the id {stored[ID]!r}. Name these "
                    "rows by another `source`, or `replace` the entries."
                )


@dataclass
class _Inserts:
    """Adds parts to a table."""

    table: EntryTable
    replace: bool
    upkeep: bool
    rows_read: int = 0
    rows_written: int = 0
    rows_known: int = 0

    def finished(self) -> list[int]:
        return []

    def write(self, number: int, table: pa.Table, rows_read: int) -> None:
        self.rows_read += rows_read
        self.rows_written += len(table)
        if len(table) == 0:
            return
        if self.replace:
            self.table.replace(table)
        else:
            self.rows_known += len(table) - self.table.insert(table)
        if self.upkeep:
            self.table.keep_up()

    def report(self) -> None:
        """
        Raises:
            ValueError: no row could be used.
        """
        if self.rows_read and not self.rows_written and len(self.table) == 0:
            raise ValueError(f"None of the {self.rows_read} rows can be used; the log has each one's reason.")
        if self.rows_written < self.rows_read:
            logger.warning("Skipped %d of %d rows.", self.rows_read - self.rows_written, self.rows_read)
        if self.rows_known:
            logger.warning(
                "%d entries were there already: another process has added the same rows, or ids occur twice.",
                self.rows_known,
            )


def _finish(table: EntryTable, ann: str | None) -> None:
    """Keeps the table in order, and its approximate index as it is wanted."""
    if ann == "auto":
        ann = table.ann or (ANN_DEFAULT if len(table) >= ANN_ROWS else None)
    if ann != table.ann:
        table.index_embeddings(ann)
    else:
        table.keep_up()
