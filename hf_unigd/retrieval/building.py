"""Making an index: in parts, so that an interruption costs no more than one."""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from datasets.arrow_writer import ArrowWriter
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data import Example, ExampleCheck, ExampleDataset, RowError, RowParser
from ..data.formats import check_columns
from ..modeling import SequenceError, UniGDProcessor
from ..modeling.images_unigd import MAX_PIXELS
from ..outputs import remove_unfinished, writing
from ..settings import check_positive
from .description import DESCRIPTION_FILE, IndexDescription, dtype_name
from .embedding import embed_sequences
from .entries import entry_features, make_entry
from .index import FAISS_FILE, EmbeddingIndex
from .nearest import make_faiss_index, write_faiss_index
from .parts import finished_parts, part_file, read_entries, rows_done
from .probe import probe


logger = logging.getLogger(__name__)


def build_index(
    model: PreTrainedModel,
    processor: UniGDProcessor,
    rows: Dataset,
    folder: str | Path,
    *,
    model_name: str | None = None,
    faiss: str | None = None,
    truncate_dim: int | None = None,
    store_images: bool = True,
    image_folder: str | Path | None = None,
    max_image_pixels: int = MAX_PIXELS,
    skip_bad_rows: bool = False,
    batch_size: int = 32,
    rows_per_part: int = 1000,
    overwrite: bool = False,
    show_progress: bool = True,
) -> EmbeddingIndex:
    """
    Embeds the anchors of a dataset (of a chat, the questions; answers come along) into a folder to be searched. A row
    without an `instruction` gets the processor's instruction of a `"document"`. A run that was interrupted goes on
    with the first rows that are missing; a finished index is only loaded.

    Args:
        model: Embeds the rows, and later the queries.
        processor: Its processor.
        rows: A map-style dataset of any accepted format; answers, captions and matches may be missing.
        folder: Where to write, or to go on.
        model_name: Hub id or folder to load the model from again; that which `model` was loaded from by default.
        faiss: FAISS's name of an index to search by (`"Flat"`, `"HNSW32"`, `"IVF1024,Flat"`); exact search by default.
            Another one can be made of a finished index without embedding again.
        truncate_dim: Matryoshka prefix to keep.
        store_images: Whether pictures are kept, as PNG, to be shown and put into prompts.
        image_folder: Folder that image paths start from and must not leave.
        max_image_pixels: The largest width times height of an image.
        skip_bad_rows: Leave bad rows out, counted in the log, instead of stopping.
        batch_size: Rows a forward pass, and in memory at once.
        rows_per_part: Rows that an interruption can cost.
        overwrite: Throw away the index that the folder has, instead of going on with it.
        show_progress: Whether to draw a progress bar.

    Raises:
        ValueError: the rows are a stream, none, of no accepted format or all bad; the folder holds something else, or
            an index of another model, other rows or other settings; FAISS cannot make `faiss`.
        RowError: a row is bad and `skip_bad_rows` is off. What was embedded is kept.
        ImportError: `faiss` is given and not installed.
    """
    folder = Path(folder)
    check_positive(batch_size=batch_size, rows_per_part=rows_per_part, truncate_dim=truncate_dim)
    if isinstance(rows, IterableDataset):
        raise ValueError("An index goes on by row numbers, which a stream does not have: load the rows without it.")
    if len(rows) == 0:
        raise ValueError("The dataset has no rows.")
    if rows.format["type"] != "custom":  # a transform may make other columns than are stored
        check_columns(rows.column_names, requires_match=False)
    name = model_name or model.name_or_path
    description = IndexDescription(
        model=name,
        # A merged adapter bears its base's name and commit, which are not its own.
        revision=getattr(model.config, "_commit_hash", None) if name == model.name_or_path else None,
        dtype=dtype_name(model),
        probe=probe(model, processor),
        truncate_dim=truncate_dim,
        store_images=store_images,
        rows=rows._fingerprint,
        num_rows=len(rows),
        faiss=faiss,
        instruction=processor.get_instruction("document"),
    )
    width = truncate_dim or model.config.embedding_dim
    # Hours later would be too late to learn that a prefix was not trained, or that an index cannot be made.
    if truncate_dim:
        embed_sequences(model, processor, ["prefix"], truncate_dim=truncate_dim, show_progress=False)
    if faiss:
        make_faiss_index(faiss, width)
    _open(folder, description, model, processor, overwrite)

    parser = RowParser(
        len,
        long_caption_max_tokens=sys.maxsize,
        trust_caption_columns=True,
        image_folder=image_folder,
        max_image_pixels=max_image_pixels,
        requires_match=False,
        find_reserved=processor.find_reserved,
        instruction=description.instruction,
    )
    writer = _PartWriter(model, processor, rows, parser, description, width, skip_bad_rows, batch_size)
    done = rows_done(folder)
    if 0 < done < len(rows):
        logger.warning("Going on at row %d of %d.", done, len(rows))
    with tqdm(total=len(rows), initial=done, desc="Indexing", unit="row", disable=not show_progress) as progress:
        for start in range(done, len(rows), rows_per_part):
            stop = min(start + rows_per_part, len(rows))
            writer.write(part_file(folder, start, stop), start, stop, progress)

    return _finish(folder, description)


def _open(folder, description, model, processor, overwrite) -> None:
    """Begins an index, or checks that the one begun before is the same."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder, "rows-*.arrow", FAISS_FILE, DESCRIPTION_FILE)
    made = IndexDescription.load(folder)
    if made is None:
        if any(folder.iterdir()):
            raise ValueError(f"{folder} holds other files, and no index. Choose a new folder.")
    elif overwrite:
        for file in [folder / FAISS_FILE, *reversed(finished_parts(folder))]:  # what is left has no gap
            file.unlink(missing_ok=True)
    elif finished_parts(folder):
        made.check_model(model, processor)
        description.check_same(made)
    if made is not None and made.faiss != description.faiss:
        (folder / FAISS_FILE).unlink(missing_ok=True)
    description.save(folder)


def _finish(folder, description) -> EmbeddingIndex:
    """Adds the FAISS index where one is wanted and missing."""
    exact = EmbeddingIndex(description, read_entries(folder))
    skipped = description.num_rows - len(exact)
    if skipped:
        logger.warning("Skipped %d of %d rows.", skipped, description.num_rows)
    if len(exact) == 0:
        raise ValueError(f"None of the {description.num_rows} rows can be used; the log has each one's reason.")
    file = folder / FAISS_FILE
    if description.faiss and not file.is_file():
        write_faiss_index(description.faiss, exact.width, len(exact), exact.chunks, file)
    return EmbeddingIndex.load(folder)


@dataclass
class _PartWriter:
    model: PreTrainedModel
    processor: UniGDProcessor
    rows: Dataset
    parser: RowParser
    description: IndexDescription
    width: int
    skip_bad_rows: bool
    batch_size: int

    def write(self, file: Path, start: int, stop: int, progress: tqdm) -> None:
        """Embeds the rows `start` to `stop` into a file, one batch in memory at a time."""
        features = entry_features(self.width)
        check = ExampleCheck(self.processor, self.model.config.context_length, causal_lm=False, contrastive=False)
        with (
            writing(file) as unfinished,
            ArrowWriter(path=str(unfinished), features=features, writer_batch_size=self.batch_size) as writer,
        ):
            for first in range(start, stop, self.batch_size):
                places = range(first, min(first + self.batch_size, stop))
                examples = list(ExampleDataset(self.rows, self.parser, places, self.skip_bad_rows, check=check))
                for example, embedding in self._embed(examples):
                    entry = make_entry(example, self.description.store_images)
                    writer.write({**entry, "embedding": embedding.numpy()})
                progress.update(len(places))
            writer.finalize()

    def _embed(self, examples: list[Example]) -> list[tuple[Example, torch.Tensor]]:
        """The examples that can be embedded, and their embeddings."""
        while examples:
            try:
                embeddings = embed_sequences(
                    self.model,
                    self.processor,
                    [example.anchor for example in examples],
                    self.batch_size,
                    self.description.truncate_dim,
                    show_progress=False,
                )
                return list(zip(examples, embeddings, strict=True))
            except SequenceError as error:
                bad = RowError(examples[error.index].row, error.reason)
                if not self.skip_bad_rows:
                    raise bad from error
                logger.warning("Skipped: %s", bad)
                examples = [example for example in examples if example.row != bad.row]
        return []
