"""The check of all rows of a dataset before training: divided among processes and workers, and done once."""

import copy
import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from huggingface_hub.constants import HF_HOME
from tqdm.auto import tqdm

from ..outputs import writing
from ..version import __version__
from .check import ExampleCheck
from .example import Example, RowError
from .images import blank_image


logger = logging.getLogger(__name__)

CHECK_LEVELS = ("off", "text", "full")
CACHE = Path(HF_HOME, "hf_unigd", "checked_rows")
# The time that a check takes is estimated after so many rows, and said if it is more than so many seconds.
ESTIMATED_AFTER, WORTH_SAYING = 1000, 60
_BATCH = 100  # rows that a worker returns at a time


@dataclasses.dataclass
class CheckedRows:
    """
    What the check of a dataset found. Arrays and ranges, unlike lists, are shared with the workers of data loaders.

    Attributes:
        indices: Indices of the rows that can be used, in order.
        lengths: Length of each of their examples in tokens, of shape `(len(indices),)`, int32. None if lengths were
            not asked for.
    """

    indices: Sequence[int] | np.ndarray
    lengths: np.ndarray | None = None


def check_examples(
    examples: Any,
    level: str,
    check: Callable[[Example], None] | None = None,
    length_of: Callable[[Example], int] | None = None,
    num_workers: int = 0,
) -> CheckedRows:
    """
    Reads every row of a dataset once. Each process reads its share with its own workers, and all return the same. What
    was found in a `datasets` dataset is kept in `HF_HOME`, for the next run with the same rows and settings. Files
    that rows name by their paths are not looked at again then.

    Args:
        examples: An [`ExampleDataset`] of all rows. If it skips bad rows, their reasons are logged.
        level: `"text"` reads columns, texts and the headers of images; `"full"` also decodes the images and reads the
            features of slices.
        check: Raises a [`RowError`] for an example that cannot be used.
        length_of: Returns the length of an example.
        num_workers: Number of workers of each process.

    Raises:
        RowError: a row is bad, and `examples` does not skip bad rows.
        ValueError: no row can be used.
    """
    count, state = len(examples.rows), PartialState()
    file = _cache_file(examples, level, check, length_of is not None)
    # The first process decides, because the others may not see its files.
    found = [_read(file, count) if state.is_main_process else None]
    if state.num_processes > 1:
        broadcast_object_list(found)
    if found[0] is None:
        good, lengths = _check_share(examples, level, check, length_of, num_workers, state)
        if state.num_processes > 1:
            shares = gather_object([(good, lengths)])
            good, lengths = (np.concatenate(parts) for parts in zip(*shares, strict=True))
        if file is not None and state.is_main_process:
            _write(file, good, lengths)
    else:
        good, lengths = found[0]
        logger.info("The %d rows were checked before (%s).", count, file)
        if not good.all() and not examples.skip_bad_rows:
            _Judge(examples, level, check, length_of)[int(good.argmin())]  # raises, as it did or would have done then
    if not good.any():
        raise ValueError(f"None of the {count} rows can be used.")
    if not good.all():
        logger.warning("Skipped %d of %d rows.", count - int(good.sum()), count)
    indices = range(count) if good.all() else np.flatnonzero(good).astype(np.min_scalar_type(count))
    return CheckedRows(indices, None if length_of is None else lengths[good])


def _check_share(examples, level, check, length_of, num_workers, state) -> tuple[np.ndarray, np.ndarray]:
    """Whether each row of this process's share is good, and its length."""
    count = len(examples.rows)
    first, last = (count * rank // state.num_processes for rank in (state.process_index, state.process_index + 1))
    judge = _Judge(examples, level, check, length_of)
    loader: Any = torch.utils.data.DataLoader(
        judge, _BATCH, sampler=range(first, last), num_workers=num_workers, collate_fn=list
    )
    lengths = np.full(last - first, -1, dtype=np.int32)
    start, done, is_said = time.monotonic(), 0, False
    with tqdm(total=last - first, desc="Checking rows", unit="row", disable=not state.is_main_process) as progress:
        for results in loader:
            for result in results:
                if isinstance(result, str):
                    logger.warning("Skipped: %s", result)
                else:
                    lengths[done] = result
                done += 1
            progress.update(len(results))
            rest = (time.monotonic() - start) / done * (last - first - done)
            if done >= ESTIMATED_AFTER and not is_said and state.is_main_process:
                is_said = True
                if rest > WORTH_SAYING:
                    logger.warning(
                        "The check of %d rows will take about %d minutes more. It is divided among processes and "
                        "`dataloader_num_workers`, and done once. `check_rows=off` leaves it out.",
                        *(count, max(1, round(rest / 60))),
                    )
    return lengths >= 0, lengths


class _Judge(torch.utils.data.Dataset):
    """Returns the length of each row's example, or why it is bad."""

    def __init__(self, examples, level, check, length_of):
        examples = copy.copy(examples)
        examples.check = check
        examples.set_epoch(None)  # every caption that an epoch may draw is checked
        if level == "text":
            examples.parser = dataclasses.replace(examples.parser, read_image=blank_image)
            examples.slice_features = None  # which are compared with the pixels
        self.examples = examples
        self.length_of = length_of

    def __getitem__(self, index):
        try:
            example = self.examples.parse(index)
        except RowError as error:
            if not self.examples.skip_bad_rows:
                raise
            return str(error)
        return 0 if self.length_of is None else self.length_of(example)


def _cache_file(examples, level, check, with_lengths) -> Path | None:
    """The file that keeps what was found, whose name tells the rows and all settings; or None."""
    rows = examples.rows
    if not isinstance(rows, Dataset) or rows.format["type"] is not None or not isinstance(check, ExampleCheck):
        return None  # what decides is not known
    parser = {
        field.name: str(getattr(examples.parser, field.name))
        for field in dataclasses.fields(examples.parser)
        if field.name not in ("count_tokens", "find_reserved", "read_image", "left_out")  # of others, or not settings
    }
    features = examples.slice_features
    settings = {
        "version": __version__,
        "rows": rows._fingerprint,
        "count": len(rows),
        "level": level,
        "lengths": with_lengths,
        "parser": parser,
        "check": check.settings,
        "slice_features": None if features is None else features.rows._fingerprint,
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    return CACHE / f"{key}.npz"


def _read(file: Path | None, count: int) -> tuple[np.ndarray, np.ndarray] | None:
    if file is None or not file.is_file():
        return None
    try:
        with np.load(file) as saved:
            good = np.unpackbits(saved["good"], count=count).astype(bool)
            return good, saved["lengths"] if "lengths" in saved else np.zeros(count, dtype=np.int32)
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        logger.warning("%s cannot be read (%s), so the rows are checked again.", file, error)
        return None


def _write(file: Path, good: np.ndarray, lengths: np.ndarray) -> None:
    content: Any = {"good": np.packbits(good), **({"lengths": lengths} if lengths.any() else {})}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with writing(file) as unfinished, unfinished.open("wb") as stream:
            np.savez(stream, **content)
    except OSError as error:
        logger.warning("What was found could not be written to %s (%s): the next run checks again.", file, error)
