"""Embedding a dataset into one Parquet file."""

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from accelerate.utils import broadcast_object_list
from datasets import ClassLabel, Features, List, Value
from transformers import PreTrainedModel

from ..data import Example, RowError, RowParser
from ..data.example import Messages
from ..data.formats import check_columns, format_of
from ..modeling import UniGDProcessor
from ..modeling.images_unigd import MAX_PIXELS
from ..outputs import remove_unfinished
from ..settings import check_positive
from .batches import Embedded, Embedder, RowsRead, SequenceBatches, as_fixed_size_lists, gather_results
from .parts import PartFolder, check_same, description_of
from .probe import probe, probes_differ
from .processes import process_state
from .sequences import embed_sequences
from .work import OpenedRows, Rows, work_through


logger = logging.getLogger(__name__)

COLUMNS = ("anchor", "positive")
_MATCHING_CAPTIONS = ("short_caption", "caption")


def embed_dataset(
    model: PreTrainedModel,
    processor: UniGDProcessor,
    rows: Rows,
    output: str | Path,
    *,
    model_name: str | None = None,
    columns: Sequence[str] = ("anchor",),
    keep_columns: Sequence[str] = (),
    prompt_name: str = "query",
    truncate_dim: int | None = None,
    image_folder: str | Path | None = None,
    max_image_pixels: int = MAX_PIXELS,
    skip_bad_rows: bool = False,
    batch_size: int = 32,
    rows_per_part: int = 1000,
    num_workers: int = 0,
    overwrite: bool = False,
    show_progress: bool = True,
) -> int:
    """
    Embeds the rows of a dataset into a Parquet file, in their order. If a launcher started several processes, each
    embeds its share, and all of them call this. A run that was interrupted goes on with the parts that are missing; a
    finished file is left as it is.

    The file has the columns `row` (int64, the number of the row in the dataset), those of `keep_columns`, and for each
    of `columns` its embeddings, `anchor_embedding` and `positive_embedding`: lists of float32 of a fixed size, unit
    vectors.

    Args:
        model: Embeds the rows. It is in evaluation mode afterwards.
        processor: Its processor.
        rows: A dataset of any accepted format; answers, captions and matches may be missing. Each process reads all of
            a stream, and a run that goes on reads it from its beginning; images are opened in the missing parts alone.
        output: The file to write. Until it is finished, its parts are in a hidden folder beside it.
        model_name: Hub id or folder of the model; that which `model` was loaded from by default.
        columns: What of a row is embedded: `"anchor"` (the image of a captioned image; of a chat, all before its last
            answer), `"positive"` (its match: the short caption, ...), or both.
        keep_columns: Columns of the rows to write beside the embeddings, each of single values.
        prompt_name: Name of the processor's instruction of anchors, in rows without an `instruction` of their own:
            `"query"`, with which anchors are trained, or another one, such as `"document"` for what is searched.
            Positives have that of a `"document"`.
        truncate_dim: Matryoshka prefix to keep.
        image_folder: Folder that image paths start from and must not leave.
        max_image_pixels: The largest width times height of an image.
        skip_bad_rows: Leave bad rows out, each with its reason in the log, instead of stopping.
        batch_size: Sequences a forward pass.
        rows_per_part: Rows of a part, which an interruption can cost each process and each of its workers.
        num_workers: Number of processes that open and process images beside each process.
        overwrite: Throw away the file, or the parts of an interrupted run.
        show_progress: Whether to draw a progress bar.

    Returns:
        Number of rows in the file.

    Raises:
        ValueError: there are no rows, they have no accepted format or are all bad, a column is unknown, or `output` is
            another file, or was begun with another model, other rows or other settings.
        RowError: a row is bad and `skip_bad_rows` is off. The parts that are finished are kept.
    """
    output = Path(output)
    check_positive(batch_size=batch_size, rows_per_part=rows_per_part, truncate_dim=truncate_dim)
    opened = OpenedRows.of(rows, num_workers)
    if getattr(rows, "format", {}).get("type") != "custom":  # a transform may make other columns than are stored
        check_columns(opened.features, requires_match=False, kept=keep_columns)
    width = truncate_dim or model.config.embedding_dim
    features = _make_features(columns, keep_columns, opened.features, width)
    if truncate_dim:  # hours later would be too late to learn that a prefix was not trained
        embed_sequences(model, processor, ["prefix"], truncate_dim=truncate_dim, show_progress=False)
    parts = PartFolder(output.parent / f".{output.name}.parts")
    is_finished, state = None, process_state()
    if state.is_main_process:
        name = model_name or model.name_or_path
        description = {
            "model": name,
            # A merged adapter bears its base's name and commit, which are not its own.
            "revision": getattr(model.config, "_commit_hash", None) if name == model.name_or_path else None,
            "dtype": str(model.dtype).removeprefix("torch."),
            "probe": probe(model, processor),
            **opened.identity,
            "columns": list(columns),
            "keep_columns": list(keep_columns),
            "instructions": [processor.get_instruction(each) for each in (prompt_name, "document")],
            "truncate_dim": truncate_dim,
            "image_folder": image_folder and str(image_folder),
            "rows_per_part": rows_per_part,
        }
        is_finished = _begin(output, parts, description, overwrite)
    if not broadcast_object_list([is_finished])[0]:
        parser = RowParser(
            len,
            short_caption_max_tokens=sys.maxsize,  # a caption of any length is a match
            long_caption_max_tokens=sys.maxsize,
            trust_caption_columns=True,
            image_folder=image_folder,
            max_image_pixels=max_image_pixels,
            requires_match=False,
            find_reserved=processor.find_reserved,
            instruction=processor.get_instruction(prompt_name),
            document_instruction=processor.get_instruction("document"),
        )
        read = _RowReader(parser, columns, keep_columns)
        prepare = SequenceBatches(processor, read, model.config.context_length, batch_size, skip_bad_rows)
        run = Embedder(model.eval(), truncate_dim)
        work_through(
            opened.rows,
            parts,
            rows_per_part,
            prepare,
            run,
            lambda results: _make_table(results, features),
            num_workers=num_workers,
            title="Embedding",
            show_progress=show_progress,
        )
        if state.is_main_process:
            _finish(output, parts)
        state.wait_for_everyone()
    return pq.read_metadata(output).num_rows


def check_embeddable(columns: Sequence[str]) -> None:
    """
    Raises:
        ValueError: `columns` are none, or not some of `COLUMNS`.
    """
    if not columns or len(set(columns)) < len(columns) or not set(columns) <= set(COLUMNS):
        raise ValueError(f"`columns` must be some of {', '.join(COLUMNS)}, got {' '.join(columns) or 'none'}.")


def _make_features(columns: Sequence[str], keep_columns: Sequence[str], features: Features, width: int) -> Features:
    """The features of the file.

    Raises:
        ValueError: a column to embed is unknown or named twice, or one to keep is missing, has lists or images, or the
            name of another.
    """
    check_embeddable(columns)
    made: dict[str, Any] = {f"{column}_embedding": List(Value("float32"), length=width) for column in columns}
    kept: dict[str, Any] = {"row": Value("int64")}
    for name in keep_columns:
        if name not in features:
            raise ValueError(f"`keep_columns`: there is no column `{name}`, only {', '.join(sorted(features))}.")
        if not isinstance(features[name], (Value, ClassLabel)):
            raise ValueError(
                f"`keep_columns`: `{name}` is of type {type(features[name]).__name__}, and only columns of single "
                "values are kept. Keep one that tells the rows apart, or find them by `row`."
            )
        if name in made or name in kept:
            raise ValueError(f"`keep_columns`: the file has one column `{name}`. Leave it out, or rename it.")
        kept[name] = features[name]
    return Features({**kept, **made})


def _begin(output: Path, parts: PartFolder, description: dict[str, Any], overwrite: bool) -> bool:
    """Begins, or checks that what was begun before is the same. Returns whether it is finished."""
    remove_unfinished(output.parent, output.name)
    made = description_of(output) if output.exists() else parts.description()
    if output.exists() and made is None:
        raise ValueError(f"{output} exists, and no such command wrote it. Name another file.")
    if overwrite:
        output.unlink(missing_ok=True)
        parts.remove()
    elif made is not None:
        check_same(made, description, output)
        if probes_differ(made["probe"], description["probe"], (description["dtype"],)):
            raise ValueError(
                f"{output} was begun by {made['model']}, which embeds its probe elsewhere now: it has been trained "
                "since. Choose another `--output`, or start anew with `--overwrite true`."
            )
    if output.exists():
        logger.warning("%s is finished. `--overwrite true` embeds the rows again.", output)
        return True
    parts.begin(description)
    if done := len(parts.finished()):
        logger.warning("Going on: of the parts of %d rows, %d are there.", description["rows_per_part"], done)
    return False


def _finish(output: Path, parts: PartFolder) -> None:
    embedded, rows_read = parts.counts()
    if embedded == 0:
        parts.remove()
        raise ValueError(f"None of the {rows_read} rows can be used; the log has each one's reason.")
    if embedded < rows_read:
        logger.warning("Skipped %d of %d rows.", rows_read - embedded, rows_read)
    parts.merge(output)


@dataclass
class _RowReader:
    """Reads the sequences of a row, and the columns to keep beside their embeddings."""

    parser: RowParser
    columns: Sequence[str]
    keep_columns: Sequence[str]

    def __call__(self, number: int, row: Mapping[str, Any]) -> tuple[dict[str, Messages], dict[str, Any]]:
        example = self.parser(row, number)
        if "positive" in self.columns:
            self._check_match(number, row, example)
        sequences = {column: getattr(example, column) for column in self.columns}
        return sequences, {"row": number, **{name: row.get(name) for name in self.keep_columns}}

    def _check_match(self, number: int, row: Mapping[str, Any], example: Example) -> None:
        if example.positive is None:
            raise RowError(
                number, "has no match to embed. Leave `positive` out of `columns`, or embed such rows on their own."
            )
        given = {name: value for name, value in row.items() if value is not None}
        named = format_of(given, requires_match=False).under_own_names(given)
        several = next((name for name in _MATCHING_CAPTIONS if _holds_several_texts(named.get(name))), None)
        if several:
            raise RowError(
                number,
                f"has a list of captions as its `{several}`, which are not one embedding. Give each a row of its own, "
                "or leave `positive` out of `columns`.",
            )


def _holds_several_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and sum(isinstance(text, str) for text in value) > 1


def _make_table(results: list[Embedded | RowsRead], features: Features) -> pa.Table:
    rows, embeddings = gather_results(results)
    schema = features.arrow_schema
    arrays = []
    for name, kind in zip(schema.names, schema.types, strict=True):
        if isinstance(features[name], List):
            arrays.append(as_fixed_size_lists(embeddings[name.removesuffix("_embedding")], kind))
        else:
            arrays.append(pa.array([row[name] for row in rows], kind))
    return pa.Table.from_arrays(arrays, schema=schema)
