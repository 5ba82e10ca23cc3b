"""Files and folders that commands write: refused before the work begins if they cannot be written or are somebody's,
and never seen half written."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated


_UNFINISHED = ".unfinished"  # how the names end of what is being written
_ATTEMPTS = 100


@contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """
    Gives a name to write a file or folder under, beside `path`, and renames it to `path` at the end: whoever reads
    `path` reads all of it. After an error nothing is left.

    Raises:
        FileExistsError: `path` is a device or a pipe, which would be replaced.
    """
    path = Path(path).resolve()  # a link stays a link
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise FileExistsError(f"{path} is neither a file nor a folder. Name a file to write.")
    unfinished = _unfinished(path.parent, path.name)
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        _remove(unfinished)


def remove_unfinished(folder: str | Path, *names: str, older_than: float = 0.0) -> None:
    """
    Removes what processes left in a folder that were killed while they wrote to it by [`writing`].

    Args:
        folder: The folder, which need not exist.
        names: Patterns of the names that they wrote.
        older_than: Seconds since the last change, in a folder that other processes may be writing to.
    """
    latest = time.time() - older_than
    for name in names:
        for path in Path(folder).glob(f".{name}.*{_UNFINISHED}"):
            with suppress(FileNotFoundError):  # another process has finished or removed it
                if path.stat().st_mtime <= latest:
                    _remove(path)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """
    Gives a folder to write to, and moves what it holds into `path` at the end, so that this is all that `path` holds.
    After an error `path` is as it was.

    Raises:
        FileExistsError: `path` is a file, or a folder that holds files.
        OSError: `path` cannot be written.
    """
    folder = Path(path)
    check_new(folder)
    with _made(folder):
        # Inside of it, because what is beside a folder may be another disk or not writable.
        unfinished = _unfinished(folder)
        try:
            unfinished.mkdir()
            yield unfinished
            for file in unfinished.iterdir():
                file.replace(folder / file.name)
        finally:
            _remove(unfinished)


def check_new(path: str | Path) -> None:
    """
    Raises:
        FileExistsError: `path` is a file, or a folder that holds files.
    """
    folder = Path(path)
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"The output folder {folder} is not empty. Name a new folder, or empty this one.")
    if folder.is_file():
        raise FileExistsError(f"The output folder {folder} is a file. Name a new folder.")


def check_writable(folder: str | Path, name: str = "") -> None:
    """
    Writes a file into a folder, which it makes if it is missing, and removes both again: permissions alone do not tell
    what a file system allows.

    Args:
        folder: The folder.
        name: Name that a file shall have in it.

    Raises:
        ValueError: the folder or a file of that name cannot be written.
    """
    folder = Path(folder)
    trial = _unfinished(folder, name)
    for attempt in range(_ATTEMPTS):
        try:
            with _made(folder):
                try:
                    trial.touch()
                    return
                finally:
                    _remove(trial)
        except (OSError, ValueError) as error:  # a ValueError for a name that no file can have
            if isinstance(error, (FileNotFoundError, FileExistsError)) and attempt < _ATTEMPTS - 1:
                continue  # another process has tried too, and removed the folder again
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"{folder / name} cannot be written: {reason}.") from error


@dataclass(frozen=True)
class Writable:
    """A folder that can be written, if need be after it is made."""

    def check(self, name: str, value: str) -> None:
        """
        Raises:
            ValueError: the folder cannot be written.
        """
        try:
            check_writable(value)
        except ValueError as error:
            raise ValueError(f"`--{name}`: {error}") from error


@dataclass(frozen=True)
class WritableOrRemote(Writable):
    """A folder that can be written, or the address of an object store, which is not tried beforehand."""

    def check(self, name: str, value: str) -> None:
        if "://" not in value:
            super().check(name, value)


@dataclass(frozen=True)
class New(Writable):
    """A folder that can be written, and holds nothing yet."""

    def check(self, name: str, value: str) -> None:
        super().check(name, value)
        check_new(value)


@dataclass(frozen=True)
class OutputFile:
    """
    A file that can be written, and replaces at most one of the same kind.

    Attributes:
        suffix: How its name ends.
        is_same_kind: Whether the command may have written a file that exists.
    """

    suffix: str
    is_same_kind: Callable[[Path], bool]

    def check(self, name: str, value: str) -> None:
        """
        Raises:
            ValueError: the file cannot be written, has another suffix, or is not of the kind that the command writes.
        """
        path = Path(value)
        if path.suffix.lower() != self.suffix:
            raise ValueError(f"`--{name} {value}` must be a file whose name ends in {self.suffix}.")
        try:
            if path.exists() and not (path.is_file() and self.is_same_kind(path)):
                raise ValueError(f"{path} exists, and no such command wrote it. Name another file.")
            check_writable(path.parent, path.name)
        except (OSError, ValueError) as error:
            raise ValueError(f"`--{name}`: {error}") from error


OutputFolder = Annotated[str, Writable()]
NewFolder = Annotated[str, New()]


def _unfinished(folder: Path, name: str = "") -> Path:
    return folder / f".{name}.{os.getpid()}{_UNFINISHED}"


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Makes a folder and those above it. Those that are empty in the end are removed again."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for path in missing:
            with suppress(OSError):  # it holds something, or was never made
                path.rmdir()
