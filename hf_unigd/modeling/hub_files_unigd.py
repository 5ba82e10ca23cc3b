"""Finds the files of a checkpoint, in a folder or on the Hub."""

from pathlib import Path

from transformers.utils import cached_file


# The arguments of a `from_pretrained` that say where to load from, as opposed to how.
HUB_ARGUMENTS = {"cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token"}


def hub_arguments(kwargs: dict) -> dict:
    """The arguments in `kwargs`, those of a `from_pretrained`, that say where to load from and are not None."""
    return {name: value for name, value in kwargs.items() if name in HUB_ARGUMENTS and value is not None}


def find_file(name: str | Path, file: str, kwargs: dict) -> str | None:
    """
    The path of a file of the checkpoint `name`, which is downloaded if it has to be.

    Args:
        name: Folder or Hub id of the checkpoint.
        file: Name of the file in the checkpoint.
        kwargs: Arguments of a `from_pretrained`; only those in `HUB_ARGUMENTS` are used.

    Returns:
        `str`, or None if the checkpoint has no such file or cannot be reached.
    """
    return cached_file(
        name,
        file,
        **hub_arguments(kwargs),
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )


def commit_of(name: str | Path, kwargs: dict) -> str | None:
    """The commit of a Hub id that a `from_pretrained` with these arguments loads; None for a folder."""
    config = find_file(name, "config.json", kwargs)
    snapshot = Path(config or "").parent
    return snapshot.name if snapshot.parent.name == "snapshots" else None
