"""Entries and their embeddings, searched by the model that made them."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakSet

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedModel

from ..bulk.batches import as_fixed_size_lists
from ..bulk.sequences import embed_sequences
from ..modeling import UniGDProcessor
from ..outputs import writing
from .description import IndexDescription
from .entries import EMBEDDING, ID, Hit, make_hit
from .table import EntryTable, VersionRemovedError, quoted, vectors_of
from .vectors import PRECISIONS, VectorMatrix, are_unit


logger = logging.getLogger(__name__)

# Candidates for each entry that is wanted, where the search sees rounded vectors. They are scored by the stored ones.
_CANDIDATES = 4
_SAMPLE = 64
# Of reciprocal rank fusion (Cormack et al., SIGIR 2009).
_FUSION = 60

_Found = TypeVar("_Found")


class EmbeddingIndex:
    """
    A table of entries that [`build_index`] wrote, as it was when it was opened, refreshed ([`refresh`]), or last
    changed by this object. If others have removed that version meanwhile, a search moves on to the latest one, which
    the log says.

    The first search reads all vectors into memory if they fit, and later ones multiply. A table whose vectors do not
    fit, or that has an approximate index, is searched by LanceDB.

    Args:
        table: The table.
        precision: What the vectors in memory are rounded to: `"float32"`, `"float16"`, `"int8"` or `"binary"`. The
            entries found are always scored by the whole vectors.
        memory_share: The share of the free memory that the vectors may take.

    Attributes:
        description: The model, and what else the index was made with.
        table: The table.
    """

    def __init__(self, table: EntryTable, precision: str = "float32", memory_share: float = 0.25):
        if precision not in PRECISIONS:
            raise ValueError(f"`precision` must be one of {', '.join(PRECISIONS)}, got {precision!r}.")
        if precision != "float32" and table.ann is not None:
            raise ValueError(
                f"`precision={precision}` rounds vectors in memory, and {table.uri} is searched by its approximate "
                f"index, {table.ann}. Leave it out, or remove the index (`hf-unigd index --ann none`)."
            )
        self.table = table
        self.description = IndexDescription.from_metadata(table.schema.metadata, table.uri)
        self.precision = precision
        self.memory_share = memory_share
        self._vectors: VectorMatrix | None = None
        self._in_memory: bool | None = None  # not decided yet
        self._known_models: WeakSet[PreTrainedModel] = WeakSet()

    @classmethod
    def load(cls, uri: str | Path, precision: str = "float32", memory_share: float = 0.25) -> "EmbeddingIndex":
        """
        Opens an index. Of its vectors, a sample is read and checked.

        Args:
            uri: A folder, or an address of an object store that LanceDB opens (`s3://...`, `gs://...`).
            precision, memory_share: As above.

        Raises:
            ValueError: there is no index, vectors of the sample are not unit vectors, or `precision` is given for an
                index that has an approximate one.
            ImportError: LanceDB is not installed.
        """
        table = EntryTable.open(uri)
        if not are_unit(table.sample(_SAMPLE)).all():
            raise ValueError(
                f"The index in {uri} holds embeddings that are not unit vectors. It is damaged, or was not written by "
                "`hf-unigd index`: make it again."
            )
        return cls(table, precision, memory_share)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def width(self) -> int:
        """Size of an embedding."""
        return self.table.width

    def refresh(self) -> None:
        """Moves on to the latest version, with what other processes have changed."""
        self.table.refresh()
        self._vectors = self._in_memory = None

    def delete(self, ids: Iterable[str] | None = None, where: str | None = None) -> int:
        """
        Removes entries.

        Args:
            ids: Their ids.
            where: Or a filter, a condition of SQL on the columns of the index.

        Returns:
            Number of entries that were removed.

        Raises:
            ValueError: neither or both are given, or the filter cannot be read.
        """
        if (ids is None) == (where is None):
            raise ValueError("Give the `ids` of the entries to delete, or a filter, `where`.")
        if where is None:
            wanted = [quoted(each) for each in ids or []]
            if not wanted:
                return 0
            where = f"{ID} IN ({', '.join(wanted)})"
        count = self.table.delete(where)
        self.refresh()
        return count

    def check_model(self, model: PreTrainedModel, processor: UniGDProcessor) -> None:
        """
        Checks once that a model is the one that made the index.

        Raises:
            ValueError: it is another one.
        """
        if model not in self._known_models:
            self.description.check_model(model, processor)
            self._known_models.add(model)

    def search(
        self,
        model: PreTrainedModel,
        processor: UniGDProcessor,
        sequences: Sequence[Any],
        k: int = 5,
        *,
        where: str | None = None,
        offset: int = 0,
        hybrid: bool = False,
        batch_size: int = 32,
        instruction: str | None = None,
    ) -> list[list[Hit]]:
        """
        The entries most similar to each of some sequences.

        Args:
            model: The model that made the index.
            processor: Its processor.
            sequences: Texts, images, or lists of both, as [`UniGDProcessor.process_sequences`] takes them.
            k: How many to find for each, at most.
            where: A filter, a condition of SQL on the columns of the index: `"lang = 'de' AND year > 2020"`.
            offset: How many of the best to leave out, for the next page.
            hybrid: Rank by the texts of queries and entries too (BM25), and fuse both rankings by reciprocal ranks.
            batch_size: Sequences a forward pass.
            instruction: The instruction of the queries, by default the processor's `"query"`.

        Returns:
            For each sequence its hits, best first.

        Raises:
            ValueError: another model made the index, `k` or `offset` is out of range, or the filter cannot be read.
            SequenceError: a sequence cannot be processed, or is longer than the model's context.
        """
        _check_range(k, offset)
        self.check_model(model, processor)
        queries = embed_sequences(
            model,
            processor,
            sequences,
            batch_size,
            self.description.truncate_dim,
            show_progress=False,
            prompt_name="query" if instruction is None else None,
            instruction=instruction,
        )
        texts = [_text_of(sequence) for sequence in sequences] if hybrid else None
        return self.nearest(queries, k, where=where, offset=offset, texts=texts)

    def nearest(
        self,
        queries: torch.Tensor,
        k: int = 5,
        *,
        where: str | None = None,
        offset: int = 0,
        texts: Sequence[str] | None = None,
    ) -> list[list[Hit]]:
        """
        As [`search`], for embeddings.

        Args:
            queries (`torch.FloatTensor` of shape `(n, d)`): Unit vectors.
            k, where, offset: As in [`search`].
            texts: Texts of the queries, to rank by them too.

        Raises:
            ValueError: `queries` has another width than the embeddings, `k` or `offset` is out of range, or the filter
                cannot be read.
        """
        _check_range(k, offset)
        vectors = self._checked(queries)
        if texts is not None and not self.table.has_text_index:
            self.table.index_texts()
            self.refresh()  # the vectors in memory are those of an earlier version
        return self._of_a_version(lambda: self._nearest(vectors, k, where, offset, texts))

    def _nearest(
        self, vectors: np.ndarray, k: int, where: str | None, offset: int, texts: Sequence[str] | None
    ) -> list[list[Hit]]:
        wanted = k + offset
        found, taken = self._candidates(vectors, wanted, where)
        entries = _entries_of(taken)
        hits = []
        for place, candidates in enumerate(found):
            ranked = self._ranked(vectors[place], [entries[each] for each in candidates.tolist()])[:wanted]
            if texts is not None and texts[place]:
                ranked = self._fused(vectors[place], ranked, texts[place], wanted, where)
            hits.append(ranked[offset:])
        return hits

    def rank(self, queries: torch.Tensor, k: int, where: str | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
        """
        As [`nearest`], without reading what the entries hold.

        Args:
            queries (`torch.FloatTensor` of shape `(n, d)`): Unit vectors.
            k, where: As in [`search`].

        Returns:
            For each query the row ids in the table, uint64, and the cosine similarities, float32, of its hits, best
            first.

        Raises:
            ValueError: as [`nearest`] does.
        """
        _check_range(k, offset=0)
        vectors = self._checked(queries)
        return self._of_a_version(lambda: self._rank(vectors, k, where))

    def _rank(self, vectors: np.ndarray, k: int, where: str | None) -> list[tuple[np.ndarray, np.ndarray]]:
        found, taken = self._candidates(vectors, k, where, [EMBEDDING])
        row_ids, stored = taken["_rowid"].to_numpy(), vectors_of(taken[EMBEDDING])
        order, good = np.argsort(row_ids), are_unit(stored)
        ranked = []
        for query, candidates in zip(vectors, found, strict=True):
            places = order[np.searchsorted(row_ids, candidates, sorter=order)]
            places = places[good[places]]
            scores = stored[places] @ query
            best = np.argsort(-scores, kind="stable")[:k]
            ranked.append((row_ids[places[best]], scores[best]))
        return ranked

    def export(self, file: str | Path) -> None:
        """Writes all columns of all entries to a Parquet file."""
        schema = self.table.schema.remove_metadata()
        with writing(file) as unfinished, pq.ParquetWriter(unfinished, schema) as writer:
            for batch in self.table.batches(schema.names):
                writer.write_batch(batch.select(schema.names).cast(schema))

    def _of_a_version(self, search: Callable[[], _Found]) -> _Found:
        """Searches again in the latest version if the one that was opened is gone."""
        try:
            return search()
        except VersionRemovedError as error:
            logger.warning("%s This search sees the latest version.", error)
            self.refresh()
            return search()

    def _checked(self, queries: torch.Tensor) -> np.ndarray:
        if queries.shape[1] != self.width:
            raise ValueError(f"Queries of width {queries.shape[1]}, but the index holds vectors of {self.width}.")
        return queries.float().cpu().numpy()

    def _candidates(
        self, queries: np.ndarray, count: int, where: str | None, columns: Sequence[str] | None = None
    ) -> tuple[list[np.ndarray], pa.Table]:
        """Row ids of what may be among the `count` nearest of each query, and the entries of them all."""
        matrix = self._matrix()
        if matrix is None:
            tables = [self._searched(query, count, where, columns) for query in queries]
            return [table["_rowid"].to_numpy() for table in tables], pa.concat_tables(tables)
        among = None if where is None else self.table.row_ids(where)
        found = matrix.nearest(queries, count if self.precision == "float32" else _CANDIDATES * count, among)
        row_ids = np.unique(np.concatenate(found))
        if self.precision != "float32":
            return found, self.table.take(row_ids, columns)
        # The whole vectors are in memory.
        others = [name for name in columns or self.table.schema.names if name != EMBEDDING]
        taken = self.table.take(row_ids, others) if others else pa.table({"_rowid": row_ids})
        vectors = as_fixed_size_lists(matrix.take(row_ids), self.table.schema.field(EMBEDDING).type)
        return found, taken.append_column(EMBEDDING, vectors)

    def _searched(self, query: np.ndarray, count: int, where: str | None, columns: Sequence[str] | None) -> pa.Table:
        """The nearest entries as LanceDB finds them."""
        found = self.table.nearest(query, count, where, columns, _CANDIDATES)
        if are_unit(vectors_of(found[EMBEDDING])).all():
            return found
        # Vectors that are not unit take the places of others.
        return self.table.nearest(query, _CANDIDATES * count, where, columns, _CANDIDATES)

    def _matrix(self) -> VectorMatrix | None:
        """The vectors in memory, or None if LanceDB searches."""
        if self._in_memory is None:
            self._in_memory = self._fits()
        if self._vectors is None and self._in_memory:
            batches = (
                (batch["_rowid"].to_numpy(), vectors_of(batch[EMBEDDING])) for batch in self.table.batches([EMBEDDING])
            )
            self._vectors = VectorMatrix(batches, len(self), self.width, self.precision)
            if self._vectors.left_out:
                logger.warning(
                    "Left out: %d of %d entries, whose embeddings are not unit vectors.",
                    self._vectors.left_out,
                    len(self),
                )
        return self._vectors

    def _fits(self) -> bool:
        if self.table.ann is not None:
            return False
        needed = VectorMatrix.bytes_needed(len(self), self.width, self.precision)
        allowed = self.memory_share * psutil.virtual_memory().available
        if needed > allowed:
            logger.warning(
                "The vectors take %.1f GB, and %.1f GB are allowed, so each search reads them again. Make an "
                "approximate index (`hf-unigd index --ann`), round them (`precision`), or raise `memory_share`.",
                needed / 1e9,
                allowed / 1e9,
            )
        return needed <= allowed

    def _ranked(self, query: np.ndarray, entries: list[dict[str, Any]]) -> list[Hit]:
        """Hits by the similarity of the stored vectors, best first. What is not a unit vector is none."""
        good = [entry for entry in entries if are_unit(entry[EMBEDDING][None])[0]]
        hits = [make_hit(entry, float(query @ entry[EMBEDDING])) for entry in good]
        return sorted(hits, key=lambda hit: -hit.score)

    def _fused(self, query: np.ndarray, similar: list[Hit], text: str, count: int, where: str | None) -> list[Hit]:
        """Hits of both rankings, by the sum of their reciprocal ranks."""
        matching = self.table.matching(text, count, where)
        entries = _entries_of(self.table.take(matching))
        in_text = [hit for row_id in matching.tolist() for hit in self._ranked(query, [entries[row_id]])]
        fused: dict[str, float] = defaultdict(float)
        for ranking in (similar, in_text):
            for rank, hit in enumerate(ranking, 1):
                fused[hit.id] += 1 / (_FUSION + rank)
        by_id = {hit.id: hit for hit in [*similar, *in_text]}
        return sorted(by_id.values(), key=lambda hit: -fused[hit.id])[:count]


def _entries_of(taken: pa.Table) -> dict[int, dict[str, Any]]:
    """Entries by their row ids."""
    rows = taken.drop_columns([EMBEDDING]).to_pylist()
    return {
        row["_rowid"]: {**row, EMBEDDING: vector}
        for row, vector in zip(rows, vectors_of(taken[EMBEDDING]), strict=True)
    }


def _check_range(k: int, offset: int) -> None:
    if k < 1:
        raise ValueError(f"`k={k}` must be at least 1.")
    if offset < 0:
        raise ValueError(f"`offset={offset}` must be at least 0.")


def _text_of(sequence: Any) -> str:
    parts = sequence if isinstance(sequence, (list, tuple)) else [sequence]
    return " ".join(part for part in parts if isinstance(part, str))
