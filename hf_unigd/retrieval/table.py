"""The table of an index, in an embedded vector database (LanceDB)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from .entries import EMBEDDING, ID, TEXT
from .upkeep import ENOUGH, KEPT, TIERS, tier_to_join


logger = logging.getLogger(__name__)

NAME = "entries"
# Types of approximate indexes, by how LanceDB calls them, and what differs from its defaults. RaBitQ with one bit a
# number misses too many of the nearest vectors, even with candidates that are compared by the whole ones.
ANN_TYPES: dict[str, tuple[str, dict[str, int]]] = {
    "IVF_FLAT": ("IvfFlat", {}),
    "IVF_SQ": ("IvfSq", {}),
    "IVF_PQ": ("IvfPq", {}),
    "IVF_RQ": ("IvfRq", {"num_bits": 4}),
    "IVF_HNSW_SQ": ("HnswSq", {}),
    "IVF_HNSW_PQ": ("HnswPq", {}),
}
_ROWS_PER_BATCH = 8192


class VersionRemovedError(RuntimeError):
    """The version of a table that was opened is not there any more, because others have changed the table since."""


class EntryTable:
    """
    A table of entries, as it was when it was opened or last written to. Writes are transactions: others see all of one
    or nothing, and those of several processes at once all succeed. Reading raises [`VersionRemovedError`] if the
    version has been removed meanwhile, which others do to versions older than an hour.

    Attributes:
        uri: Where it is: a folder, or the address of an object store.
    """

    def __init__(self, table: Any, uri: str):
        self._table = table
        self.uri = uri

    @classmethod
    def exists(cls, uri: str | Path) -> bool:
        """Whether there is a table at the folder or address.

        Raises:
            ImportError: LanceDB is not installed.
        """
        if not _is_remote(uri):  # connecting would make the folder
            return Path(uri, f"{NAME}.lance").is_dir()
        return NAME in _connect(uri).list_tables().tables

    @classmethod
    def open(cls, uri: str | Path) -> EntryTable:
        """
        Opens the table at a folder or address without reading its entries.

        Raises:
            ValueError: there is none.
            ImportError: LanceDB is not installed.
        """
        if not cls.exists(uri):
            raise ValueError(f"{uri} holds no index; `hf-unigd index --output {uri}` makes one.")
        return cls(_connect(uri).open_table(NAME), str(uri))

    @classmethod
    def create(cls, uri: str | Path, schema: pa.Schema) -> EntryTable:
        """
        Makes an empty table. If another process makes one meanwhile, that one is opened.

        Raises:
            ValueError: the folder holds something else.
            ImportError: LanceDB is not installed.
        """
        _check_folder(uri)
        table = _connect(uri).create_table(NAME, schema=schema, exist_ok=True)
        created = cls(table, str(uri))
        if not _has_key(table.schema):
            table.set_unenforced_primary_key(ID)
        return created

    @classmethod
    def drop(cls, uri: str | Path) -> None:
        """Removes the table and all its entries."""
        if cls.exists(uri):
            _connect(uri).drop_table(NAME, ignore_missing=True)

    @property
    def schema(self) -> pa.Schema:
        return self._table.schema

    @property
    def width(self) -> int:
        """Size of the embeddings."""
        return int(self.schema.field(EMBEDDING).type.list_size)

    def __len__(self) -> int:
        return int(self._table.count_rows())

    def refresh(self) -> None:
        """Moves on to the latest version."""
        self._table.checkout_latest()

    def insert(self, entries: pa.Table) -> int:
        """Adds the entries whose ids are new, and returns their number."""
        self.refresh()  # a version that was removed meanwhile cannot be added to
        # By its key LanceDB recognises that another process has inserted the same ids meanwhile.
        result = self._table.merge_insert(ID).when_not_matched_insert_all().execute(entries)
        return int(result.num_inserted_rows)

    def replace(self, entries: pa.Table) -> None:
        """Adds entries. They take the places of those with the same ids."""
        self.refresh()
        merge = self._table.merge_insert(ID).when_matched_update_all().when_not_matched_insert_all()
        merge.execute(entries)

    def delete(self, where: str) -> int:
        """Removes the entries that a filter selects, and returns their number.

        Raises:
            ValueError: the filter cannot be read.
        """
        self.refresh()
        with self._errors(where):
            return int(self._table.delete(where).num_deleted_rows)

    def count(self, where: str | None = None) -> int:
        """Number of the entries that a filter selects.

        Raises:
            ValueError: the filter cannot be read.
        """
        with self._errors(where):
            return int(self._table.count_rows(where))

    def batches(self, columns: Sequence[str], where: str | None = None) -> Iterator[pa.RecordBatch]:
        """Reads entries, with their row ids as `_rowid`.

        Raises:
            ValueError: the filter cannot be read.
        """
        query = self._table.search().select(list(columns)).with_row_id(True)
        with self._errors(where):
            reader = (query.where(where) if where else query).to_batches(batch_size=_ROWS_PER_BATCH)
            yield from reader

    def row_ids(self, where: str) -> np.ndarray:
        """Row ids of the entries that a filter selects.

        Raises:
            ValueError: the filter cannot be read.
        """
        return _concatenated([batch["_rowid"].to_numpy() for batch in self.batches([ID], where)], np.uint64)

    def take(self, row_ids: np.ndarray, columns: Sequence[str] | None = None) -> pa.Table:
        """Reads entries by their row ids, in their order, with these as `_rowid`."""
        query = self._table.take_row_ids([int(each) for each in row_ids]).with_row_id()
        with self._errors():
            found = (query.select([*columns]) if columns else query).to_arrow()
        place = {row_id: place for place, row_id in enumerate(found["_rowid"].to_pylist())}
        return found.take(pa.array([place[int(each)] for each in row_ids], pa.int64()))

    def sample(self, count: int) -> np.ndarray:
        """Embeddings `(m, width)` of at most `count` entries from all over the table."""
        total = len(self)
        offsets = np.unique(np.linspace(0, max(total - 1, 0), min(count, total), dtype=int))
        if not len(offsets):
            return np.empty((0, self.width), np.float32)
        with self._errors():
            found = self._table.take_offsets(offsets.tolist()).select([EMBEDDING]).to_arrow()
        return vectors_of(found[EMBEDDING])

    def nearest(
        self,
        query: np.ndarray,
        count: int,
        where: str | None = None,
        columns: Sequence[str] | None = None,
        refine_factor: int = 1,
    ) -> pa.Table:
        """
        The entries with about the nearest embeddings, best first, with their row ids as `_rowid`: by an approximate
        index if there is one, else by reading all embeddings.

        Args:
            query (`np.ndarray` of shape `(width,)`): A unit vector.
            count: How many to find, at most.
            where: A filter, a condition of SQL.
            columns: Columns to read, by default all.
            refine_factor: How many candidates of the index, for each that is wanted, are compared by their whole
                embeddings.

        Raises:
            ValueError: the filter cannot be read.
        """
        search = self._table.search(query, vector_column_name=EMBEDDING).distance_type("dot").limit(count)
        search = search.refine_factor(refine_factor).select([*(columns or self.schema.names), "_distance"])
        with self._errors(where):
            return (search.where(where) if where else search).with_row_id(True).to_arrow().drop_columns(["_distance"])

    def matching(self, text: str, count: int, where: str | None = None) -> np.ndarray:
        """Row ids of the entries whose texts match best, by BM25. It needs [`index_texts`].

        Raises:
            ValueError: the filter cannot be read.
        """
        query = import_module("lancedb.query").MatchQuery(text, TEXT)
        search = self._table.search(query).limit(count).select([ID, "_score"]).with_row_id(True)
        with self._errors(where):
            return (search.where(where) if where else search).to_arrow()["_rowid"].to_numpy()

    @property
    def has_text_index(self) -> bool:
        return any(TEXT in index.columns for index in self._table.list_indices())

    def index_texts(self) -> None:
        """Makes an index of the texts, and moves on to the latest version."""
        self.refresh()  # what is made of an earlier version cannot be committed
        self._table.create_index(TEXT, config=import_module("lancedb.index").FTS())
        self.refresh()

    @property
    def ann(self) -> str | None:
        """Type of the approximate index of the embeddings, as `ANN_TYPES` has it; None if there is none."""
        found = {index.index_type.upper() for index in self._table.list_indices() if EMBEDDING in index.columns}
        return next((name for name in ANN_TYPES if name.replace("_", "") in found), None)

    def index_embeddings(self, ann: str | None) -> None:
        """Makes an approximate index of the embeddings, of a type of `ANN_TYPES`, or with None removes it.

        Raises:
            ValueError: LanceDB cannot make it.
        """
        self.refresh()
        for index in self._table.list_indices():
            if EMBEDDING in index.columns:
                self._table.drop_index(index.name)
        if ann is not None:
            name, settings = ANN_TYPES[ann]
            config = getattr(import_module("lancedb.index"), name)(distance_type="dot", **settings)
            try:
                self._table.create_index(EMBEDDING, config=config)
            except (RuntimeError, ValueError) as error:
                raise ValueError(
                    f"`ann={ann}` cannot be made of {len(self)} entries: {error}. Leave it out."
                ) from error
        self.refresh()

    def keep_up(self) -> None:
        """Does [`optimize`] for the small fragments, if additions have left many of them."""
        # The number of all fragments is known without opening them.
        if self._table.stats()["fragment_stats"]["num_fragments"] > ENOUGH:
            sizes = [fragment.metadata.num_rows for fragment in self._table.to_lance().get_fragments()]
            tier = tier_to_join(sizes)
            if tier is not None:
                self.optimize(tier)

    def optimize(self, below: int = TIERS[-1], keep: timedelta = KEPT) -> None:
        """
        Joins fragments that lie side by side, indexes what was added, and removes old versions. If other processes
        replace or delete entries meanwhile, it is left for another time, which the log says.

        Args:
            below: The fragments to join are those of fewer entries.
            keep: Age of the versions to remove.
        """
        dataset = self._table.to_lance()
        try:
            dataset.optimize.compact_files(target_rows_per_fragment=below)
            dataset.optimize.optimize_indices()
            dataset.cleanup_old_versions(older_than=keep)
        except (OSError, RuntimeError) as error:
            if "conflict" not in str(error):
                raise
            logger.warning("%s is not optimized: other processes change its entries.", self.uri)
        self.refresh()

    @contextmanager
    def _errors(self, where: str | None = None) -> Iterator[None]:
        """Turns LanceDB's errors into those of a version that is gone, or of a filter that cannot be used."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            if "Not found" in str(error) and f"{NAME}.lance" in str(error):
                raise VersionRemovedError(
                    f"{self.uri} has been changed by others, and the version that was opened here is removed: call "
                    "`refresh()` to see the latest one."
                ) from error
            if where is None:
                raise
            raise ValueError(
                f"The filter {where!r} cannot be used: {error}. It is a condition of SQL on columns of the index, "
                "such as \"lang = 'de' AND year > 2020\"."
            ) from error


def vectors_of(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """The vectors `(n, width)` of a column of lists of a fixed size."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), array.type.list_size)


def quoted(value: str) -> str:
    """A text as filters write it."""
    return "'" + value.replace("'", "''") + "'"


def _concatenated(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype)


def _has_key(schema: pa.Schema) -> bool:
    return any(b"primary-key" in name for name in schema.field(ID).metadata or {})


def _check_folder(uri: str | Path) -> None:
    folder = Path(uri)
    if _is_remote(uri) or not folder.exists():
        return
    if not folder.is_dir() or any(file.name != f"{NAME}.lance" for file in folder.iterdir()):
        raise ValueError(f"{uri} holds other files, and no index. Choose a new folder.")


def _is_remote(uri: str | Path) -> bool:
    return "://" in str(uri)


def _connect(uri: str | Path) -> Any:
    try:
        lancedb = import_module("lancedb")
    except ImportError as error:
        raise ImportError("An index is a table of LanceDB: `pip install 'hf-unigd[retrieval]'`.") from error
    return lancedb.connect(str(uri))
