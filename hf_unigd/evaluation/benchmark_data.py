"""Reads the rows of benchmarks, from the Hub or from the files that the user has fetched."""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..data import load_rows
from ..data.features import without_decoding
from .benchmarks import Benchmark
from .demon_files import read_demon
from .fetched import Parts, Read, find_file, read_json
from .matches import ImageSettings
from .question_files import (
    read_fvqa,
    read_fvqa_facts,
    read_vizwiz,
    read_webqa,
    read_webqa_positions,
    read_webqa_sources,
)
from .tsv_images import TsvImages


_PICTURES = (".jpg", ".png", ".jpeg")


class Columns(Sequence):
    """
    Rows under the names that a protocol gives their columns. Each is read when it is asked for.

    Args:
        parts: Rows, and what is the same in all of them, for each file or configuration.
        columns: Columns of the rows, by the names of the protocol.
        name: Name of the benchmark, for errors.
    """

    def __init__(self, parts: Sequence[tuple[Any, Mapping[str, Any]]], columns: Mapping[str, str], name: str):
        self.parts, self.columns, self.name = parts, columns, name
        self.places = [(part, place) for part, (rows, _) in enumerate(parts) for place in range(len(rows))]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number):
        part, place = self.places[number]
        rows, same = self.parts[part]
        row = {**rows[place], **same}
        if missing := [name for name in self.columns.values() if name not in row]:
            raise ValueError(
                f"{self.name}: row {number} has no column {', '.join(missing)}, only {', '.join(sorted(row))}."
            )
        return {own: row[name] for own, name in self.columns.items()}


@dataclass(frozen=True)
class BenchmarkData:
    """
    The rows of a benchmark.

    Attributes:
        rows: The rows, with the columns of its protocol.
        images: How their images are opened.
        description: What was read, as values that JSON can hold.
        counts: Numbers of what was left out, by name.
        knowledge: Other rows, which a model may retrieve.
    """

    rows: Sequence[Mapping[str, Any]]
    images: ImageSettings
    description: Mapping[str, Any]
    counts: Mapping[str, int] = field(default_factory=dict)
    knowledge: "BenchmarkData | None" = None

    def open(self, number: int, column: str, place: int | None = None) -> Any:
        """
        Opens the image of a row, or that at a place of a list of images.

        Raises:
            ValueError: it is missing or cannot be read.
        """
        value = self.rows[number][column]
        try:
            return self.images.open(value if place is None else value[place])
        except ValueError as error:
            raise ValueError(f"Row {number} {error}.") from error


class NotFetchedError(ValueError):
    """Raised where the rows of a benchmark are not there."""


def read_benchmark(benchmark: Benchmark, folder: str | Path | None) -> BenchmarkData:
    """
    Reads the rows of a benchmark.

    Args:
        benchmark: The benchmark.
        folder: Where the files are that the user has fetched: those of a benchmark in a folder of its name. Rows of
            the Hub may be there too, as `NAME` or `NAME/CONFIGURATION`.

    Raises:
        NotFetchedError: a file or a dataset is not there. The message says what is to be fetched.
        ValueError: it cannot be read.
    """
    given = None if folder is None else Path(folder)
    try:
        data = _read(benchmark.name, benchmark.data, benchmark.columns, given)
        if not benchmark.knowledge:
            return data
        knowledge = _read(benchmark.name, **benchmark.knowledge, folder=given)
    except (OSError, ValueError) as error:
        fetch = benchmark.fetch or f"the rows of {benchmark.source}, which the Hub has."
        kind = NotFetchedError if isinstance(error, OSError) else ValueError
        raise kind(f"{benchmark.title} cannot be read: {error}. It needs: {fetch}") from error
    description = {**data.description, "knowledge": {**knowledge.description, "rows": len(knowledge.rows)}}
    return replace(data, knowledge=knowledge, description=description)


def _read(name: str, data: Mapping[str, Any], columns: Mapping[str, str], folder: Path | None) -> BenchmarkData:
    arguments = dict(data)
    read, images = READERS[arguments.pop("reader")], arguments.pop("images", None)
    parts, description, counts = read(folder, name, images, **arguments)
    return BenchmarkData(Columns(parts, columns, name), _image_settings(images, folder), description, counts)


def _image_settings(images: str | None, folder: Path | None) -> ImageSettings:
    if images is None:
        return ImageSettings()
    if folder is None:
        raise FileNotFoundError("no `--benchmark_folder` is given")
    return TsvImages.of(folder / images) if images.endswith(".tsv") else ImageSettings(folder / images)


def _read_rows(
    folder: Path | None,
    name: str,
    images: str | None,
    path: str,
    split: str,
    revision: str | None = None,
    configs: Mapping[str, str] | None = None,
) -> Read:
    """Rows of the Hub or of an offline source, or in their place those of a folder that the user has fetched. With
    `configs`, those of each configuration, whose key is their `category`."""
    parts: Parts = []
    own = None if folder is None or not (folder / name).exists() else folder / name
    fingerprints = []
    names: list[tuple[str | None, str | None]] = [*configs.items()] if configs else [(None, None)]
    for category, config in names:
        if own is not None:
            rows = load_rows(str(own / config if config else own), split=split)
        else:
            rows = load_rows(path, config, split, revision=revision)
        fingerprints.append(rows._fingerprint if isinstance(rows, Dataset) else None)
        parts.append((without_decoding(rows), {"category": category} if category else {}))
    # Nobody knows the commit of a folder.
    commit = commit_of_dataset(path, revision) if own is None and revision else None
    return parts, {"path": path, "split": split, "revision": commit, "fingerprint": fingerprints}, {}


def commit_of_dataset(path: str, revision: str = "main") -> str | None:
    """The commit of a dataset of the Hub, as `datasets` has just loaded it into the cache; None if it is not there."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import REGEX_COMMIT_HASH

    if REGEX_COMMIT_HASH.match(revision):
        return revision
    file = Path(HF_HUB_CACHE, f"datasets--{path.replace('/', '--')}", "refs", revision)
    return file.read_text().strip() if file.is_file() else None


def _read_json(folder: Path | None, name: str, images: str | None, files: Mapping[str, str]) -> Read:
    """JSON files of records, in a list or by number, each with its `category`."""
    parts: Parts = []
    for category, file in files.items():
        content = read_json(folder, name, file)
        records = list(content.values()) if isinstance(content, dict) else content
        parts.append((records, {"category": category}))
    return parts, {"files": list(files.values())}, {}


def _read_karpathy(
    folder: Path | None, name: str, images: str | None, file: str, split: str, folder_name: str | None = None
) -> Read:
    """A split of Karpathy's `dataset_*.json`: an image with its captions a row, and the ids of both."""
    rows = [
        {
            "image": image["filename"],
            "caption": [sentence["raw"] for sentence in image["sentences"]],
            "image_id": image["imgid"],
            "caption_id": [sentence["sentid"] for sentence in image["sentences"]],
        }
        for image in read_json(folder, folder_name or name, file)["images"]
        if image["split"] == split
    ]
    return [(rows, {})], {"files": [file], "split": split}, {}


def _read_coco_captions(
    folder: Path | None,
    name: str,
    images: str | None,
    file: str,
    category: str | None = None,
    folder_name: str | None = None,
) -> Read:
    """Captions in COCO's format: an image with its captions a row, the ids of both, and a property of the image."""
    content = read_json(folder, folder_name or name, file)
    rows = {
        image["id"]: {
            "image": image["file_name"],
            "caption": [],
            "image_id": image["id"],
            "caption_id": [],
            **({category: image[category]} if category else {}),
        }
        for image in content["images"]
    }
    for annotation in content["annotations"]:
        rows[annotation["image_id"]]["caption"].append(annotation["caption"])
        rows[annotation["image_id"]]["caption_id"].append(annotation["id"])
    return [(list(rows.values()), {})], {"files": [file]}, {}


def _read_mmvp(
    folder: Path | None,
    name: str,
    images: str | None,
    file: str,
    folder_name: str | None = None,
    prefix: str = "a photo of ",
) -> Read:
    """MMVP-VLM's statements about pairs of images, after `prefix`: lines of number, category and statement, two a
    pair."""
    with find_file(folder, folder_name or name, file).open(encoding="utf-8", newline="") as opened:
        _, *lines = list(csv.reader(opened))
    if len(lines) % 2:
        raise ValueError(f"{file} has {len(lines)} statements, and two make a pair")
    rows = []
    for first, second in zip(lines[::2], lines[1::2], strict=True):
        (_, category, _), (_, other, _) = first, second
        if category != other:
            raise ValueError(f"{file} has the statements {first[0]} and {second[0]} of two categories as a pair")
        row: dict[str, Any] = {"category": category}
        for place, (number, _, statement) in enumerate((first, second)):
            row |= {
                f"image_{place}": f"{category}/{number.strip()}.jpg",
                f"caption_{place}": f"{prefix}{statement.strip()}",
            }
        rows.append(row)
    return [(rows, {})], {"files": [file]}, {}


def _read_vist(folder: Path | None, name: str, images: str | None, file: str) -> Read:
    """VIST's stories: captions and pictures in their order. Stories of which a picture is missing are left out."""
    content = read_json(folder, name, file)
    stories: dict[str, list[Mapping[str, Any]]] = {}
    for (part,) in content["annotations"]:
        stories.setdefault(part["story_id"], []).append(part)
    there = {}
    if folder is not None and images is not None:
        there = {each.stem: each.name for each in sorted((folder / images).glob("*")) if each.suffix in _PICTURES}
    rows, missing = [], 0
    for parts in stories.values():
        parts.sort(key=lambda part: int(part["worker_arranged_photo_order"]))
        ids = [part["photo_flickr_id"] for part in parts]
        if all(each in there for each in ids):
            captions = [part["original_text"] for part in parts]
            rows.append({"captions": captions, "images": [there[each] for each in ids]})
        else:
            missing += 1
    if not rows:
        raise ValueError(f"none of the {len(stories)} stories has all of its pictures in {images}")
    return [(rows, {})], {"files": [file]}, {"left_out": missing}


def _read_mteb(
    folder: Path | None, name: str, images: str | None, tasks: Sequence[str] = (), benchmark: str | None = None
) -> Read:
    """Names of MTEB's tasks, or those of one of its benchmarks. They read their own rows."""
    try:
        import mteb
    except ImportError as error:
        raise ImportError("MTEB is not installed: `pip install 'hf-unigd[evaluation]'`.") from error
    names = list(tasks) if benchmark is None else [task.metadata.name for task in mteb.get_benchmark(benchmark).tasks]
    # MTEB loads the commits that its tasks name.
    metadata = [mteb.get_task(each).metadata for each in names]
    datasets = {each.dataset["path"]: each.dataset["revision"] for each in metadata}
    description: dict[str, Any] = {"tasks": names, "mteb": version("mteb"), "revisions": datasets}
    if len(datasets) == 1:
        ((description["path"], description["revision"]),) = datasets.items()
    return [([{"task": each} for each in names], {})], description, {}


READERS: dict[str, Callable[..., Read]] = {
    "rows": _read_rows,
    "json": _read_json,
    "demon": read_demon,
    "fvqa": read_fvqa,
    "fvqa_facts": read_fvqa_facts,
    "vizwiz": read_vizwiz,
    "webqa": read_webqa,
    "webqa_positions": read_webqa_positions,
    "webqa_sources": read_webqa_sources,
    "karpathy": _read_karpathy,
    "coco_captions": _read_coco_captions,
    "mmvp": _read_mmvp,
    "mteb": _read_mteb,
    "vist": _read_vist,
}
