"""What the teachers see of a dataset's slices, computed once and kept on disk beside the data.

A folder holds `teachers.json` (what the features depend on) and parts of so many rows each, written whole or not at
all. Of a part, `features` has one row for each image or sentence that no part before it has, in half precision, and
`rows` says for each row of the data which of all these it is made of.
"""

import json
import logging
import shutil
from pathlib import Path

import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets, load_from_disk
from tqdm.auto import tqdm

from .dataset import ExampleDataset
from .slices import Slice
from .teachers import Spaces, TeacherArguments, Teachers, slice_spaces


logger = logging.getLogger(__name__)

_DESCRIPTION = "teachers.json"


class SliceFeatures:
    """Features of every slice of every row of a dataset, memory-mapped.

    Attributes:
        description: The fingerprint of the teachers, and `own_width` and `cross_width` of the features.
        rows: Dataset of the column `slices`: for each row of the data, which of the features.
        features: Dataset of the columns `key` and `features`, one row for each distinct slice.
    """

    def __init__(self, description: dict, rows: Dataset, features: Dataset):
        self.description = description
        self.rows = rows
        self.features = features.with_format("torch")
        self.width = description["own_width"] + description["cross_width"]

    @classmethod
    def load(cls, folder: str | Path, args: TeacherArguments) -> "SliceFeatures":
        """
        Args:
            folder: What [`write_slice_features`] wrote.
            args: The teachers that are to be used.

        Raises:
            ValueError: there are no features, they are incomplete, or they are other teachers'.
        """
        description = _read_description(Path(folder))
        if description is None:
            raise ValueError(
                f"{folder} holds no slice features; `hf-unigd embed-slices --output {folder}` makes them."
            )
        _refuse_other_teachers(folder, description, args.fingerprint())
        parts = _parts(Path(folder))
        written = sum(len(rows) for rows, _ in parts)
        if written < description["num_rows"]:
            raise ValueError(
                f"{folder} has features of {written} of {description['num_rows']} rows; run `hf-unigd embed-slices` "
                "again, which goes on where it stopped."
            )
        rows, features = (concatenate_datasets(list(column)) for column in zip(*parts, strict=True))
        return cls(description, rows, features)

    def spaces(self, triple_kernel: bool = True) -> Spaces:
        return slice_spaces(self.description["own_width"], self.description["cross_width"], triple_kernel)

    def of_row(self, row: int, slices: list[Slice]) -> torch.Tensor:
        """Features `(len(slices), width)` of the slices of a row, float16.

        Raises:
            ValueError: the row was another one, or bad, when the features were made.
        """
        if row >= len(self.rows):
            raise ValueError(f"has no slice features: they end at row {len(self.rows) - 1}")
        places = self.rows[row]["slices"]
        entry = self.features[places] if places else {"key": torch.zeros(0), "features": torch.zeros(0, self.width)}
        if entry["key"].tolist() != [part.key for part in slices]:
            raise ValueError(
                "has changed since its slice features were made; make them anew with `hf-unigd embed-slices "
                "--overwrite`"
            )
        if entry["features"].shape[1] != self.width:
            raise ValueError(f"has slice features of width {entry['features'].shape[1]}, {self.width} is needed")
        return entry["features"]


def write_slice_features(
    examples: ExampleDataset,
    args: TeacherArguments,
    folder: str | Path,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    rows_per_part: int = 1000,
    overwrite: bool = False,
) -> SliceFeatures:
    """
    Runs the teachers once over a dataset; each distinct image and sentence is encoded once. A run that was interrupted
    goes on with the first part that is missing.

    Args:
        examples: The rows, parsed with a splitter, so that each example has its slices. Where it skips bad rows, they
            have no features.
        args: The teachers.
        folder: Where to write.
        device: Where the teachers run.
        batch_size: Images or sentences a forward pass.
        rows_per_part: Rows that an interruption can cost.
        overwrite: Throw away what the folder has, instead of going on with it.

    Raises:
        ValueError: the folder has features of other teachers, or of another number of rows.
        RowError: a row is bad and `examples` does not skip bad rows.
    """
    folder = Path(folder)
    if overwrite and _read_description(folder) is not None:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    fingerprint = args.fingerprint()
    description = _read_description(folder)
    teachers = Teachers(args, device)
    if description is None:
        widths = {"own_width": teachers.own_width, "cross_width": teachers.cross_width}
        description = {**fingerprint, **widths, "num_rows": len(examples)}
        (folder / _DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    _refuse_other_teachers(folder, description, fingerprint)
    if description["num_rows"] != len(examples):
        raise ValueError(
            f"{folder} has features of a dataset of {description['num_rows']} rows, this one has {len(examples)}. "
            "Choose another `--output`, or `--overwrite` it."
        )
    parts = _parts(folder)
    done = sum(len(rows) for rows, _ in parts)
    places: dict[int, int] = {}
    for _, features in parts:
        for key in features["key"]:
            places[key] = len(places)
    if done:
        logger.warning("Going on at row %d of %d.", done, len(examples))

    part = len(parts)
    with tqdm(total=len(examples), initial=done, desc="Embedding slices", unit="row") as progress:
        for start in range(done, len(examples), rows_per_part):
            rows: list[list[int]] = []
            keys: list[int] = []
            vectors: list[torch.Tensor] = []
            waiting: list[Slice] = []  # decoded pictures among them: no more than a batch
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
        logger.warning("%d texts were longer than an encoder takes, and cut as it does.", teachers.truncated)
    return SliceFeatures.load(folder, args)


def _write_part(folder: Path, rows: list[list[int]], keys: list[int], vectors: torch.Tensor) -> None:
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    Dataset.from_dict({"slices": rows}, Features({"slices": List(Value("int64"))})).save_to_disk(unfinished / "rows")
    Dataset.from_dict(
        {"key": keys, "features": vectors.numpy()},
        Features({"key": Value("int64"), "features": List(Value("float16"), length=vectors.shape[1])}),
    ).save_to_disk(unfinished / "features")
    unfinished.rename(folder)


def _parts(folder: Path) -> list[tuple[Dataset, Dataset]]:
    """Rows and features of the finished parts, in order."""
    folders = sorted(part for part in folder.glob("part-*") if part.suffix != ".unfinished")
    return [(load_from_disk(part / "rows"), load_from_disk(part / "features")) for part in folders]


def _read_description(folder: Path) -> dict | None:
    file = folder / _DESCRIPTION
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _refuse_other_teachers(folder, description: dict, fingerprint: dict[str, str]) -> None:
    changed = [name for name, value in fingerprint.items() if description.get(name) != value]
    if changed:
        listing = "; ".join(f"{name} was {description.get(name)!r}, now {fingerprint[name]!r}" for name in changed)
        raise ValueError(
            f"The slice features in {folder} are stale: {listing}. Make them anew with `hf-unigd embed-slices "
            "--overwrite`, or use the teachers that they were made with."
        )
