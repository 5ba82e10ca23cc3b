"""Runs all images and captions with all prompts, in blocks that are kept, so that an interrupted run goes on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from accelerate.utils import gather_object
from datasets.fingerprint import Hasher
from tqdm.auto import tqdm

from ...bulk import process_state
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
    The folder of finished blocks, which is hidden beside `output`. If a launcher started several processes, all call
    this, and the first makes it.

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
    parts = PartFolder(output.parent / f".{output.name}.parts")
    state = process_state()
    if state.is_main_process:
        _begin(parts, output, _description(model, processors, items, model_name, batch_size), overwrite)
    state.wait_for_everyone()
    return parts


def _description(model, processors, items: CaptionedImages, model_name: str, batch_size: int) -> dict[str, Any]:
    """What the blocks depend on."""
    processor = next(iter(processors["image"].values()))
    return {
        "model": model_name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "probe": probe(model, processor),
        "rows": Hasher.hash([items.keys, items.found.pairs.tolist()]),
        "rows_per_part": max(BLOCK, batch_size),
        **{f"{modality}_prompts": list(processors[modality]) for modality in MODALITIES},
    }


def _begin(parts: PartFolder, output: Path, description: dict[str, Any], overwrite: bool) -> None:
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


def run_prompts(
    model: UniGDForConditionalGeneration,
    processors: Mapping[str, Mapping[str, UniGDProcessor]],
    items: CaptionedImages,
    parts: PartFolder,
    batch_size: int = 32,
    show_progress: bool = True,
) -> dict[str, Summaries]:
    """
    What the model makes of every image with every image prompt, and of every caption with every text prompt. If a
    launcher started several processes, each runs its share of the blocks, and all receive all of them.

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
    state = process_state()
    finished, size = parts.finished(), max(BLOCK, batch_size)
    found: dict[str, Summaries] = {}
    blocks = [(modality, first) for modality in MODALITIES for first in range(0, items.count(modality), size)]
    share = range(state.process_index, len(blocks), state.num_processes)
    for modality in MODALITIES:
        count = items.count(modality)
        own = {
            number: range(first, min(first + size, count))
            for number in share
            for kind, first in [blocks[number]]
            if kind == modality
        }
        title = f"{len(processors[modality])} {modality} prompts"
        made: dict[int, Summaries] = {}
        with tqdm(total=sum(map(len, own.values())), desc=title, unit=modality, disable=not show_progress) as progress:
            for number, places in own.items():
                if number in finished:
                    made[number] = _from_table(parts.read(number), len(places))
                    progress.update(len(places))
                    continue
                sequences, rows = items.read(modality, places)
                made[number] = summarize(
                    model,
                    list(processors[modality].values()),
                    sequences,
                    rows,
                    SIDES[modality],
                    batch_size,
                    progress.update,
                )
                parts.write(number, _to_table(made[number]), len(places))
        every = {number: block for each in gather_object([made]) for number, block in each.items()}
        found[modality] = Summaries.join([every[number] for number in sorted(every)])
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
