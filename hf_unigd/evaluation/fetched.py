"""Files of benchmarks that the user has fetched."""

import json
from pathlib import Path
from typing import Any, TypeAlias

from ..inputs import reading


# Rows, and what is the same in all of them, for each file or configuration.
Parts: TypeAlias = list[tuple[Any, dict[str, Any]]]
# What a reader returns: the rows, what was read, and the numbers of what was left out.
Read: TypeAlias = tuple[Parts, dict[str, Any], dict[str, int]]


def find_file(folder: Path | None, name: str, file: str) -> Path:
    """
    A file in the folder of a benchmark.

    Raises:
        FileNotFoundError: it is not there, or no folder is given.
    """
    if folder is None:
        raise FileNotFoundError("no `--benchmark_folder` is given")
    path = folder / name / file
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    return path


def read_json(folder: Path | None, name: str, file: str) -> Any:
    """
    The content of a JSON file in the folder of a benchmark.

    Raises:
        FileNotFoundError: as [`find_file`].
        ValueError: it is not JSON.
    """
    path = find_file(folder, name, file)
    with reading(path):
        return json.loads(path.read_text(encoding="utf-8"))
