"""Adding captions to the images of a dataset."""

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from accelerate.utils import broadcast_object_list
from datasets import Features, LargeList, List, Value
from PIL import Image

from ..data import RowError
from ..data.formats import FORMATS, format_of
from ..data.images import open_image
from ..data.lengths import length_batches
from ..modeling.images_unigd import MAX_PIXELS
from ..settings import check_positive
from .captioners import KINDS, Captioner, Preparation
from .parts import PartFolder, begin_output
from .processes import process_state
from .tables import table_of_rows
from .work import OpenedRows, Row, Rows, refuse, windows, work_through


logger = logging.getLogger(__name__)

CAPTIONS = next(each for each in FORMATS if each.name == "captions")
_TEXTS = (Value("string"), Value("large_string"))
# What tokenizers write special tokens with: <image>, </s>, <|im_end|>, [INST].
_MARKUP = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")


def caption_dataset(
    captioner: Captioner,
    rows: Rows,
    output: str | Path,
    kind: str,
    *,
    replace_captions: bool = False,
    image_folder: str | Path | None = None,
    max_image_pixels: int = MAX_PIXELS,
    skip_bad_rows: bool = False,
    rows_per_part: int = 1000,
    num_workers: int = 0,
    overwrite: bool = False,
    show_progress: bool = True,
) -> int:
    """
    Writes a dataset again, with captions where they are missing, as VladVA's authors did (short ones by BLIP-2, long
    ones by ShareGPT-4V's captioner). All columns stay, and images stay the bytes or paths that they are. If a launcher
    started several processes, each captions its share, and all of them call this. A run that was interrupted goes on
    with the parts that are missing; a finished output is left as it is.

    A caption is of no use if it is empty, or holds what tokenizers read as a special token (`<image>`, `<|im_end|>`,
    `[INST]`), which training refuses. Such a caption is left out, and its row too if it has no other caption.

    Args:
        captioner: Captions images.
        rows: A dataset with a column `image`, or another name of it, in any form that rows may have. Each process
            reads all of a stream, and a run that goes on reads it from its beginning; images are opened in the missing
            parts alone.
        output: The folder to write. `load_rows` and `load_dataset` load it, in the split `train`.
        kind: `"short"` or `"long"`: whether `short_caption` or `long_caption` is written.
        replace_captions: Caption rows that have such a caption, too.
        image_folder: Folder that image paths start from and must not leave.
        max_image_pixels: The largest width times height of an image.
        skip_bad_rows: Leave bad rows out, each with its reason in the log, instead of stopping.
        rows_per_part: Rows of a file, which an interruption can cost each process and each of its workers.
        num_workers: Number of processes that open and process images beside each process.
        overwrite: Throw away what the folder holds, or the parts of an interrupted run.
        show_progress: Whether to draw a progress bar.

    Returns:
        Number of rows in the output.

    Raises:
        ValueError: there are no rows, they are not images, or all bad, or the output was begun with another model,
            other rows or other settings, or holds other files.
        RowError: a row is bad and `skip_bad_rows` is off. The parts that are finished are kept.
    """
    output = Path(output)
    check_positive(rows_per_part=rows_per_part)
    opened = OpenedRows.of(rows, num_workers)
    column = f"{kind}_caption"
    features = _make_features(column, opened.features)
    parts, data = PartFolder(output / ".parts"), PartFolder(output / "data")
    is_finished, state = None, process_state()
    if state.is_main_process:
        description = {
            **captioner.description,
            **opened.identity,
            "kind": kind,
            "replace_captions": replace_captions,
            "image_folder": image_folder and str(image_folder),
            "rows_per_part": rows_per_part,
        }
        is_finished = begin_output(output, data, [parts], description, overwrite)
    if not broadcast_object_list([is_finished])[0]:
        work_through(
            opened.rows,
            parts,
            rows_per_part,
            _Preparation(
                captioner.preparation,
                column,
                replace_captions,
                image_folder,
                max_image_pixels,
                captioner.batch_size,
                skip_bad_rows,
            ),
            _Captioning(captioner, column, _is_list(features[column]), skip_bad_rows),
            lambda results: _make_table(results, features),
            num_workers=num_workers,
            title="Captioning",
            show_progress=show_progress,
        )
        if state.is_main_process:
            _finish(parts, data)
        state.wait_for_everyone()
    return data.counts()[0]


def check_captionable(columns: list[str], kind: str) -> None:
    """
    Raises:
        ValueError: captions of this kind cannot be added to rows with these columns, or `kind` is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"`kind={kind}` must be one of {', '.join(KINDS)}.")
    own = {column: CAPTIONS.aliases.get(column, column) for column in columns}
    if "image" not in own.values():
        raise ValueError(
            f"Captions need a column `image`, and the dataset has {', '.join(sorted(columns))}. Rename it: "
            "`--rename_columns photo:image`."
        )
    captions = [column for column in columns if own[column] == "caption"]
    if captions:
        others = "".join(f" {name}:original_{name}" for name in captions[1:])
        raise ValueError(
            f"The dataset has a column `{captions[0]}`, whose use depends on its length, so no `{kind}_caption` can "
            f"stand beside it. Rename it: `--rename_columns {captions[0]}:short_caption{others}`, or to long_caption."
        )


def _make_features(column: str, features: Features) -> Features:
    check_captionable(list(features), column.removesuffix("_caption"))
    kept = features.get(column, Value("null"))
    if kept == Value("null"):
        kept = Value("string")
    if kept not in _TEXTS and not (_is_list(kept) and kept.feature in _TEXTS):
        raise ValueError(
            f"The column `{column}` holds {kept}, and captions are texts, or lists of texts. Rename it, or make texts "
            "of it."
        )
    return Features({**features, column: kept})


def _is_list(feature: Any) -> bool:
    return isinstance(feature, (List, LargeList))


def _finish(parts: PartFolder, data: PartFolder) -> None:
    written, rows_read = parts.counts()
    if written == 0:
        parts.remove()
        raise ValueError(f"None of the {rows_read} rows can be used; the log has each one's reason.")
    if written < rows_read:
        logger.warning("Left out %d of %d rows.", rows_read - written, rows_read)
    parts.folder.replace(data.folder)  # all at once


@dataclass(frozen=True)
class _Images:
    """Rows whose images are captioned, or that stay as they are."""

    rows: list[Row]
    inputs: Any = None

    @property
    def completed(self) -> int:
        return len(self.rows)


@dataclass
class _Preparation:
    """Makes batches of the images of rows."""

    prepare: Preparation
    column: str
    replace_captions: bool
    image_folder: str | Path | None
    max_image_pixels: int
    batch_size: int
    skip_bad_rows: bool

    def __call__(self, rows: Iterator[Row]) -> Iterator[_Images]:
        for window in windows(rows, self.batch_size):
            images: dict[int, Image.Image] = {}
            ready = []
            for number, row in window:
                try:
                    image = self._image(number, row)
                    if image is None:
                        ready.append((number, row))
                    else:
                        images[number] = image
                except RowError as error:
                    refuse(error, self.skip_bad_rows)
            yield _Images(ready)
            numbers, by_number = list(images), dict(window)
            lengths = [self.prepare.length(image) for image in images.values()]
            for places in length_batches(lengths, self.batch_size):
                batch = {numbers[place]: images[numbers[place]] for place in places}
                inputs = self._process(batch)
                if batch:
                    yield _Images([(number, by_number[number]) for number in batch], inputs)

    def _image(self, number: int, row: Mapping[str, Any]) -> Image.Image | None:
        """The image of a row that needs a caption."""
        given = {name: value for name, value in row.items() if value is not None}
        try:
            found = format_of(given, requires_match=False)
            if found is not CAPTIONS:
                raise ValueError(f"is a {found.name} row ({found.summary[1]}), and captions are for an `image` alone")
            if not self.replace_captions and holds_text(row.get(self.column)):
                return None
            return open_image(found.under_own_names(given)["image"], self.image_folder, self.max_image_pixels)
        except ValueError as error:
            raise RowError(number, f"{str(error).removesuffix('.')}.") from error

    def _process(self, batch: dict[int, Image.Image]) -> Any:
        """Prepares the images of a batch, and removes those that cannot be."""
        try:
            return self.prepare(list(batch.values()))
        except Exception:  # an image processor refuses an image in its own way, and does not say which
            for number, image in list(batch.items()):
                try:
                    self.prepare([image])
                except Exception as error:
                    refuse(
                        RowError(number, f"has an image that the captioner cannot take: {error}"), self.skip_bad_rows
                    )
                    del batch[number]
        return self.prepare(list(batch.values())) if batch else None


@dataclass
class _Captioning:
    captioner: Captioner
    column: str
    as_list: bool
    skip_bad_rows: bool

    def __call__(self, batch: _Images) -> list[Row]:
        if batch.inputs is None:
            return batch.rows
        captioned: list[Row] = []
        for (number, row), caption in zip(batch.rows, self.captioner(batch.inputs), strict=True):
            if isinstance(caption, ValueError):
                refuse(RowError(number, str(caption)), self.skip_bad_rows)
                continue
            row = {**row, self.column: self._usable(number, caption)}
            if any(holds_text(row.get(f"{kind}_caption")) for kind in KINDS):
                captioned.append((number, row))
        return captioned

    def _usable(self, number: int, caption: str) -> str | list[str] | None:
        caption = caption.strip()
        if not caption or _MARKUP.search(caption):
            logger.warning("The caption of row %d is left out: %r.", number, caption)
            return None
        return [caption] if self.as_list else caption


def holds_text(value: Any) -> bool:
    """Whether the value of a column is a caption, or a list of some."""
    return any(isinstance(text, str) and text.strip() for text in (value if isinstance(value, list) else [value]))


def _make_table(results: list[list[Row]], features: Features) -> pa.Table:
    rows = sorted((row for result in results for row in result), key=lambda row: row[0])
    return table_of_rows([row for _, row in rows], features)
