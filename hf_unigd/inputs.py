"""Files, folders and repositories that are read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def reading(source: str | Path) -> Iterator[None]:
    """
    Names `source` in the errors that occur while it is read. Libraries often say what is wrong in a file, and not in
    which.

    Raises:
        ValueError: it cannot be read. Errors that name it, and those of this machine (a package that is missing, too
            little memory) or of the computation, stay what they are.
    """
    try:
        yield
    except (ImportError, MemoryError, RuntimeError):
        raise
    except Exception as error:
        if str(source) in str(error):
            raise
        raise ValueError(f"{source}: {error}") from error
