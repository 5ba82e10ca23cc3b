"""Mining hard negatives: the entries of an index that are close to a row's anchor, and are no match of it."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from accelerate.utils import broadcast_object_list
from datasets import Dataset, Features
from transformers import PreTrainedModel

from ..bulk.batches import Embedder, SequenceBatches
from ..bulk.parts import PartFolder, begin_output
from ..bulk.processes import process_state
from ..bulk.tables import table_of_rows
from ..bulk.work import OpenedRows, Row, Rows, windows, work_through
from ..data import RowParser
from ..data.lengths import TokenCounter
from ..modeling import UniGDProcessor
from ..modeling.images_unigd import MAX_PIXELS
from ..settings import check_positive
from .building import source_name
from .candidates import Candidates, MinedRow, modality_counts
from .entry_reading import RowIds
from .index import EmbeddingIndex
from .mining_report import SCORES, MiningReport
from .mining_rows import AnchorReader, Matches, anchor_table, shared_anchors
from .negative_columns import NegativeColumns, negative_columns
from .negative_rules import NegativeRules


logger = logging.getLogger(__name__)

_ROWS_TO_INFER_FROM = 16


def mine_negatives(
    model: PreTrainedModel,
    processor: UniGDProcessor,
    index: EmbeddingIndex,
    rows: Rows,
    output: str | Path,
    *,
    num_negatives: int = 3,
    range_min: int = 0,
    range_max: int | None = None,
    max_score: float | None = None,
    min_score: float | None = None,
    absolute_margin: float | None = None,
    relative_margin: float | None = None,
    sampling_strategy: str = "top",
    seed: int = 0,
    source: str | None = None,
    id_column: str | None = None,
    short_caption_max_tokens: int = 30,
    long_caption_max_tokens: int = 500,
    trust_caption_columns: bool = False,
    image_folder: str | Path | None = None,
    max_image_pixels: int = MAX_PIXELS,
    skip_bad_rows: bool = False,
    batch_size: int = 32,
    rows_per_part: int = 1000,
    num_workers: int = 0,
    overwrite: bool = False,
    show_progress: bool = True,
) -> MiningReport:
    """
    Writes a dataset again, with negatives for each row: the sequences of entries of an index that are close to the
    row's anchor. Where the positive is a text they are texts, where it is an image they are images, and where it is of
    both they are too. All columns stay, and images stay the bytes or paths that they are. A row with fewer than
    `num_negatives` is left out.

    An entry is no negative of a row if it is the row's own, or if what it holds, embedded or not, equals by its pixels
    or its normalised text the anchor, or anything that matches the anchor in any row that has it (all captions of an
    image among them), or a negative that the row has. Equal entries count as one.

    If a launcher started several processes, each mines for its share of the rows, and all of them call this. A run
    that was interrupted goes on with the parts that are missing; a finished output is left as it is.

    Args:
        model: The model that made the index. It is in evaluation mode afterwards.
        processor: Its processor.
        index: An index of what the rows are to find.
        rows: A dataset whose rows have matches, and a format that may have negatives. Anchors are embedded with the
            processor's instruction of a `"query"` and positives with that of a `"document"`, unless the rows have
            their own. Each process reads all of a stream, twice.
        output: The folder to write. `load_rows` and `load_dataset` load it, in the split `train`.
        num_negatives, range_min, range_max, max_score, min_score, absolute_margin, relative_margin, sampling_strategy,
        seed: The rules ([`~hf_unigd.retrieval.negative_rules.NegativeRules`]), those of sentence-transformers.
        source, id_column: As in [`build_index`], to tell which entry is a row's own.
        short_caption_max_tokens, long_caption_max_tokens, trust_caption_columns: As in training: which captions are
            positives.
        image_folder: Folder that image paths start from and must not leave.
        max_image_pixels: The largest width times height of an image.
        skip_bad_rows: Leave bad rows out, each with its reason in the log, instead of stopping.
        batch_size: Sequences a forward pass.
        rows_per_part: Rows of a file, which an interruption can cost each process and each of its workers.
        num_workers: Number of processes that open and process images beside each process.
        overwrite: Throw away what the folder holds, or the parts of an interrupted run.
        show_progress: Whether to draw progress bars.

    Returns:
        How many rows there are, and how similar their negatives.

    Raises:
        ValueError: a rule is out of range, another model made the index, the rows have no match or cannot hold
            negatives, there are no rows or not enough negatives for any, or the output was begun with another index,
            other rows or other settings, or holds other files.
        RowError: a row is bad, or the index has no entry of the modality of its positive, and `skip_bad_rows` is off.
            The parts that are finished are kept.
    """
    output = Path(output)
    check_positive(batch_size=batch_size, rows_per_part=rows_per_part)
    rules = NegativeRules(
        num_negatives,
        range_min,
        range_max,
        max_score,
        min_score,
        absolute_margin,
        relative_margin,
        sampling_strategy,
        seed,
    )
    opened = OpenedRows.of(rows, num_workers)
    is_transformed = getattr(rows, "format", {}).get("type") == "custom"
    features = _transformed_features(rows) if is_transformed else opened.features
    columns = negative_columns(features, num_negatives)
    anchors, scores = PartFolder(output / ".anchors"), PartFolder(output / ".scores")
    parts, data = PartFolder(output / ".parts"), PartFolder(output / "data")
    ids = RowIds(source or source_name(rows), id_column)
    is_finished, state = None, process_state()
    if state.is_main_process:
        index.check_model(model, processor)
        description = {
            "index": index.table.uri,
            "index_made_with": xxhash.xxh3_64_hexdigest(repr(index.description).encode()),
            "entries": len(index),
            "dtype": str(model.dtype).removeprefix("torch."),
            "instructions": [processor.get_instruction(side) for side in ("query", "document")],
            **opened.identity,
            **asdict(rules),
            "source": ids.source,
            "id_column": id_column,
            "short_caption_max_tokens": short_caption_max_tokens,
            "long_caption_max_tokens": long_caption_max_tokens,
            "trust_caption_columns": trust_caption_columns,
            "image_folder": image_folder and str(image_folder),
            "rows_per_part": rows_per_part,
        }
        is_finished = begin_output(output, data, [anchors, parts], description, overwrite, kept=[scores])
    if not broadcast_object_list([is_finished])[0]:
        parser = RowParser(
            TokenCounter(processor.tokenizer),
            short_caption_max_tokens=short_caption_max_tokens,
            long_caption_max_tokens=long_caption_max_tokens,
            trust_caption_columns=trust_caption_columns,
            image_folder=image_folder,
            max_image_pixels=max_image_pixels,
            find_reserved=processor.find_reserved,
            instruction=processor.get_instruction("query"),
            document_instruction=processor.get_instruction("document"),
        )
        read = AnchorReader(parser, ids, columns, frozenset(modality_counts(index)))
        work_through(
            opened.rows,
            anchors,
            rows_per_part,
            SequenceBatches(processor, read, model.config.context_length, batch_size, skip_bad_rows),
            Embedder(model.eval(), index.description.truncate_dim),
            lambda results: anchor_table(results, index.width),
            num_workers=num_workers,
            title="Embedding",
            show_progress=show_progress,
        )
        # The first process reads what all have written: others may see the file system later.
        (shared,) = broadcast_object_list([shared_anchors(anchors) if state.is_main_process else None])
        added = {name: kind for each in columns.values() for name, kind in each.features.items()}
        written = Features({**features, **added})
        work_through(
            opened.rows,
            _MinedParts(parts, scores, written, num_negatives),
            rows_per_part,
            _Windows(batch_size),
            _Miner(
                Candidates(index, columns, max_image_pixels),
                rules,
                columns,
                _AnchorParts(anchors, rows_per_part, shared, held=max(num_workers, 1)),
                features if is_transformed else None,
            ),
            lambda results: _make_table(results, written),
            num_workers=num_workers,
            title="Mining",
            show_progress=show_progress,
        )
        if state.is_main_process:
            _finish(parts, data, scores, rules)
        state.wait_for_everyone()
    if state.is_main_process:
        anchors.remove()
    return MiningReport.of(scores, rules)


def _transformed_features(rows: Dataset) -> Features:
    """The features of what a transform makes of rows, by the first of them."""
    return Dataset.from_list([rows[number] for number in range(min(len(rows), _ROWS_TO_INFER_FROM))]).features


def _finish(parts: PartFolder, data: PartFolder, scores: PartFolder, rules: NegativeRules) -> None:
    written, rows_read = parts.counts()
    report = MiningReport.of(scores, rules)
    if not report.positive_scores.size:
        raise ValueError(f"None of the {rows_read} rows can be used; the log has each one's reason.")
    if bad := rows_read - report.positive_scores.size:
        logger.warning("Skipped %d of %d rows.", bad, rows_read)
    if written == 0:
        raise ValueError(
            f"The index has not enough negatives for any row. Start anew with `--overwrite true`.\n{report}"
        )
    if report.left_out:
        logger.warning("Left out %d rows that have too few negatives.", report.left_out)
    parts.folder.replace(data.folder)  # all at once


@dataclass(frozen=True)
class _Window:
    rows: list[Row]

    @property
    def completed(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class _Mined:
    """A row: its number, its scores ([`SCORES`]), and its values, none if it has too few negatives."""

    number: int
    scores: dict[str, Any]
    row: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Windows:
    """Makes batches of rows as they are."""

    batch_size: int

    def __call__(self, rows: Iterator[Row]) -> Iterator[_Window]:
        return map(_Window, windows(rows, self.batch_size))


class _AnchorParts:
    """
    What the first pass has kept of rows, read a part at a time.

    Args:
        folder: Its parts.
        rows_per_part: Number of rows of a part.
        shared: What matches the anchors that several rows have.
        held: Number of parts that are read by turns.
    """

    def __init__(self, folder: PartFolder, rows_per_part: int, shared: Mapping[int, Matches], held: int):
        self._folder = folder
        self._rows_per_part = rows_per_part
        self._shared = shared
        self._part = lru_cache(held)(self._read)

    def __call__(self, number: int) -> MinedRow | None:
        """A row, or None if it was skipped."""
        return self._part(number // self._rows_per_part).get(number)

    def _read(self, part: int) -> dict[int, MinedRow]:
        table = self._folder.read(part)
        if len(table) == 0:
            return {}
        vectors = table["embedding"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
        rows = table.drop_columns(["embedding"]).to_pylist()
        return {row["row"]: self._mined(row, vector) for row, vector in zip(rows, vectors, strict=True)}

    def _mined(self, row: Mapping[str, Any], vector: np.ndarray) -> MinedRow:
        own = Matches(frozenset(row["known"]), row["positive_score"])
        matches = self._shared.get(row["anchor_key"], own)
        return MinedRow(
            row["row"], vector, row["id"], row["format"], row["modality"], matches.known, matches.positive_score
        )


@dataclass
class _Miner:
    """
    Finds the negatives of rows.

    Attributes:
        candidates: Finds what may be one.
        rules: Choose among them.
        columns: Hold them, by the formats of the rows.
        anchors: What is known of the rows.
        transformed: Features of the rows of a transform, which are encoded by them; None for rows as they are stored.
    """

    candidates: Candidates
    rules: NegativeRules
    columns: Mapping[str, NegativeColumns]
    anchors: _AnchorParts
    transformed: Features | None

    def __call__(self, window: _Window) -> list[_Mined]:
        given = dict(window.rows)
        rows = [found for number in given if (found := self.anchors(number)) is not None]
        results = []
        chosen: dict[int, list[int]] = {}
        for row, (row_ids, scores) in zip(rows, self.candidates.find(rows, self.rules.candidates), strict=True):
            places, skipped = self.rules.choose(scores, row.positive_score, row.number)
            if len(places) == self.rules.num_negatives:
                chosen[row.number] = row_ids[places].tolist()
            report = {
                "row": row.number,
                "positive_score": row.positive_score,
                "negative_scores": scores[places].tolist(),
                "candidates": len(scores),
                **{f"skipped_{name}": count for name, count in skipped.items()},
            }
            results.append(_Mined(row.number, report))
        parts = self.candidates.parts(row_id for row_ids in chosen.values() for row_id in row_ids)
        for row, result in zip(rows, results, strict=True):
            if row.number in chosen:
                negatives = [parts[row_id] for row_id in chosen[row.number]]
                result.row.update(self._encoded(given[row.number]), **self.columns[row.row_format].values(negatives))
        return results

    def _encoded(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        return row if self.transformed is None else self.transformed.encode_example(row)


@dataclass
class _MinedParts:
    """
    Writes the rows that have their negatives, and before them the scores of all.

    Attributes:
        data: Where the rows go.
        scores: Where the scores go.
        features: Those of the rows.
        num_negatives: How many negatives a row has.
    """

    data: PartFolder
    scores: PartFolder
    features: Features
    num_negatives: int

    def finished(self) -> dict[int, Path]:
        return self.data.finished()

    def write(self, number: int, table: pa.Table, rows_read: int) -> None:
        scores = pa.Table.from_struct_array(table.columns[-1])
        self.scores.write(number, scores, rows_read)
        enough = pc.equal(pc.list_value_length(scores["negative_scores"]), self.num_negatives)
        rows = table.select(list(range(table.num_columns - 1))).filter(enough)
        self.data.write(number, rows.replace_schema_metadata(self.features.arrow_schema.metadata), rows_read)


def _make_table(results: list[list[_Mined]], features: Features) -> pa.Table:
    """The rows, with their scores in the last column."""
    mined = sorted((row for result in results for row in result), key=lambda each: each.number)
    scores = pa.array([each.scores for each in mined], pa.struct(list(SCORES)))
    return table_of_rows([each.row for each in mined], features).append_column("scores", scores)
