"""Runs all images and captions with all prompts, in blocks that are kept, so that an interrupted run goes on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from datasets.fingerprint import Hasher
from tqdm.auto import tqdm

from ...bulk.parts import PartFolder, check_same
from ...bulk.probe import probe, probes_differ
from ...modeling import UniGDForConditionalGeneration, UniGDProcessor
from .items import CaptionedImages
from .lists import MODALITIES
from .summaries import Summaries, summarize


BLOCK = 128  # images or captions of a block, if a batch is not larger
SIDES = {"image": "query", "text": "document"}  # the instructions of both sides, if the model has them
_FIELDS = ("embeddings", "entropies", "probabilities")


def begin_parts(
    output: Path,
    model: UniGDForConditionalGeneration,
    processors: Mapping[str, Mapping[str, UniGDProcessor]],
    items: CaptionedImages,
    model_name: str,
    batch_size: int = 32,
    overwrite: bool = False,
) -> PartFolder:
    """
    The folder of finished blocks, which is hidden beside `output`.

    Args:
        output: Folder that the results are written to in the end.
        model: The model.
        processors: Its processors by modality and prompt.
        items: The images and captions.
        model_name: Hub id or folder of the model.
        batch_size: Images or captions per forward pass.
        overwrite: Throw away what an interrupted run has left.

    Raises:
        ValueError: it was begun with another model, other prompts or other rows.
    """
    processor = next(iter(processors["image"].values()))
    description: dict[str, Any] = {
        "model": model_name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "probe": probe(model, processor),
        "rows": Hasher.hash(items.keys),
        "rows_per_part": max(BLOCK, batch_size),
        **{f"{modality}_prompts": list(processors[modality]) for modality in MODALITIES},
    }
    parts = PartFolder(output.parent / f".{output.name}.parts")
    if overwrite:
        parts.remove()
    elif (made := parts.description()) is not None:
        check_same(made, description, output)
        if probes_differ(made["probe"], description["probe"], (description["dtype"],)):
            raise ValueError(
                f"{output} was begun by {made['model']}, which embeds its probe elsewhere now: it has been trained "
                "since. Choose another `--output`, or start anew with `--overwrite true`."
            )
    parts.begin(description)
    return parts


def run_prompts(
    model: UniGDForConditionalGeneration,
    processors: Mapping[str, Mapping[str, UniGDProcessor]],
    items: CaptionedImages,
    parts: PartFolder,
    batch_size: int = 32,
    show_progress: bool = True,
) -> dict[str, Summaries]:
    """
    What the model makes of every image with every image prompt, and of every caption with every text prompt.

    Args:
        model: The model.
        processors: Its processors by modality and prompt.
        items: The images and captions.
        parts: Where finished blocks are kept ([`begin_parts`]).
        batch_size: Images or captions per forward pass.
        show_progress: Whether to draw progress bars.

    Returns:
        The summaries by modality, with the prompts in the order of `processors`.

    Raises:
        RowError: an image or caption cannot be processed.
    """
    finished, size = parts.finished(), max(BLOCK, batch_size)
    found: dict[str, Summaries] = {}
    number = 0
    for modality in MODALITIES:
        count = items.count(modality)
        title = f"{len(processors[modality])} {modality} prompts"
        with tqdm(total=count, desc=title, unit=modality, disable=not show_progress) as progress:
            blocks = []
            for first in range(0, count, size):
                places = range(first, min(first + size, count))
                if number in finished:
                    blocks.append(_from_table(parts.read(number), len(places)))
                    progress.update(len(places))
                else:
                    sequences, rows = items.read(modality, places)
                    block = summarize(
                        model,
                        list(processors[modality].values()),
                        sequences,
                        rows,
                        SIDES[modality],
                        batch_size,
                        progress.update,
                    )
                    parts.write(number, _to_table(block), len(places))
                    blocks.append(block)
                number += 1
        found[modality] = Summaries.join(blocks)
    return found


def _to_table(block: Summaries) -> pa.Table:
    """A table with a row for each prompt."""
    columns = {}
    for name in _FIELDS:
        values = getattr(block, name).flatten(1).numpy()
        columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    return pa.table(columns)


def _from_table(table: pa.Table, count: int) -> Summaries:
    values = {}
    for name in _FIELDS:
        column = table.column(name).combine_chunks()
        values[name] = torch.tensor(column.flatten().to_numpy()).reshape(len(column), -1)
    values["embeddings"] = values["embeddings"].reshape(table.num_rows, count, -1)
    return Summaries(**values)
