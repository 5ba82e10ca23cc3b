"""Runs the teachers over a dataset once and writes their features in the format that [`SliceFeatures`] reads."""

import json
import logging
import shutil
from pathlib import Path

import torch
from datasets import Dataset, Features, List, Value
from tqdm.auto import tqdm

from ..outputs import remove_unfinished, writing
from ..settings import check_positive
from .dataset import ExampleDataset
from .example import Slice
from .mixture import MixedDataset
from .slice_features import (
    DESCRIPTION,
    SliceFeatures,
    check_fingerprint,
    finished_parts,
    read_description,
    read_parts,
)
from .teachers import TeacherArguments, Teachers


logger = logging.getLogger(__name__)


def write_slice_features(
    examples: ExampleDataset | MixedDataset,
    args: TeacherArguments,
    folder: str | Path,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    rows_per_part: int = 1000,
    overwrite: bool = False,
) -> SliceFeatures:
    """
    Runs the teachers over a dataset and writes the features of its slices.

    Each distinct image or sentence is encoded once. An interrupted run resumes with the first missing part.

    Args:
        examples: The dataset, whose parser has a splitter, so that every example has its slices. If it skips bad rows,
            they get no features.
        args: The teachers.
        folder: Folder to write, or to resume.
        device: Device that the teachers run on.
        batch_size: Maximum number of slices that are passed to the teachers at once.
        rows_per_part: Number of rows per part. An interruption loses at most one part.
        overwrite: Delete the features that the folder has, instead of resuming.

    Returns:
        The features that were written.

    Raises:
        ValueError: the folder has features of other teachers, or of a dataset with another number of rows, or holds
            other files.
        RowError: a row is bad and `examples` does not skip bad rows.
    """
    folder = Path(folder)
    check_positive(batch_size=batch_size, rows_per_part=rows_per_part)
    remove_unfinished(folder, "part-*", DESCRIPTION)
    description = read_description(folder)
    if description is None and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds other files, and no slice features. Choose a new folder as `--output`.")
    fingerprint = args.fingerprint()
    teachers = Teachers(args, device)
    if overwrite and description is not None:
        for written in finished_parts(folder):  # nothing but what was written here
            shutil.rmtree(written)
        (folder / DESCRIPTION).unlink()
        description = None
    folder.mkdir(parents=True, exist_ok=True)
    if description is None:
        widths = {"own_width": teachers.own_width, "cross_width": teachers.cross_width}
        description = {**fingerprint, **widths, "num_rows": len(examples)}
        with writing(folder / DESCRIPTION) as file:
            file.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    check_fingerprint(folder, description, fingerprint)
    if description["num_rows"] != len(examples):
        raise ValueError(
            f"{folder} has features of a dataset of {description['num_rows']} rows, but this dataset has "
            f"{len(examples)}. Choose another `--output`, or delete these features with `--overwrite`."
        )
    parts = read_parts(folder)
    done = sum(len(rows) for rows, _ in parts)
    places: dict[int, int] = {}
    for _, features in parts:
        for key in features["key"]:
            places[key] = len(places)
    if done:
        logger.warning("Resuming at row %d of %d.", done, len(examples))

    part = len(parts)
    with tqdm(total=len(examples), initial=done, desc="Embedding slices", unit="row") as progress:
        for start in range(done, len(examples), rows_per_part):
            rows: list[list[int]] = []
            keys: list[int] = []
            vectors: list[torch.Tensor] = []
            waiting: list[Slice] = []  # at most one batch, because images are decoded
            for place in range(start, min(start + rows_per_part, len(examples))):
                example = examples[place]
                rows.append([])
                for one in [] if example is None else example.slices:
                    if (key := one.key) not in places:
                        places[key] = len(places)
                        keys.append(key)
                        waiting.append(one)
                    rows[-1].append(places[key])
                    if len(waiting) == batch_size:
                        vectors.append(teachers(waiting).cpu().half())
                        waiting.clear()
                progress.update()
            if waiting:
                vectors.append(teachers(waiting).cpu().half())
            width = teachers.own_width + teachers.cross_width
            _write_part(folder / f"part-{part:05d}", rows, keys, torch.cat([torch.zeros(0, width).half(), *vectors]))
            part += 1
    if teachers.truncated:
        logger.warning("%d texts were longer than the limit of an encoder and were truncated.", teachers.truncated)
    return SliceFeatures.load(folder, args)


def _write_part(folder: Path, rows: list[list[int]], keys: list[int], vectors: torch.Tensor) -> None:
    places = Dataset.from_dict({"slices": rows}, Features({"slices": List(Value("int64"))}))
    features = Dataset.from_dict(
        {"key": keys, "features": vectors.numpy()},
        Features({"key": Value("int64"), "features": List(Value("float16"), length=vectors.shape[1])}),
    )
    with writing(folder) as unfinished:
        places.save_to_disk(unfinished / "rows")
        features.save_to_disk(unfinished / "features")
