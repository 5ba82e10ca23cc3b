"""Finds and reads the files of a checkpoint, in a folder or on the Hub."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from transformers.utils import cached_file


ADAPTER_CONFIG_NAME, INDEX_NAME = "adapter_config.json", "model.safetensors.index.json"
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


def read_json(file: str | Path, kind: type = dict):
    """
    What a JSON file of a checkpoint holds.

    Args:
        file (`str` or `os.PathLike`): Its path.
        kind (`type`, *optional*, defaults to `dict`): What it must hold.

    Raises:
        ValueError: the file holds something else, or no JSON.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} holds no JSON that can be read: {error}. Save or download it again.") from error
    if not isinstance(content, kind):
        raise ValueError(f"{file} holds a {type(content).__name__}, not a {kind.__name__}. Save or download it again.")
    return content


def check_json(name, files: Iterable[str], kwargs: dict) -> None:
    """
    Raises:
        ValueError: one of these files of the checkpoint `name` is there, but holds no JSON, or no dict.
    """
    for file in files:
        if path := find_file(name, file, kwargs):
            read_json(path)


def is_adapter(name, kwargs: dict) -> bool:
    """Whether a folder or Hub repository holds an adapter. `kwargs` are those of a `from_pretrained`."""
    return find_file(name, ADAPTER_CONFIG_NAME, kwargs) is not None


def weight_files(name, kwargs: dict) -> list[str]:
    """
    The safetensors that loading a checkpoint reads: the adapter's, or else the model's, in one file or in the shards
    that its index names.

    Args:
        name (`str` or `os.PathLike`): Folder or Hub id of the checkpoint.
        kwargs: Arguments of a `from_pretrained`; only those in `HUB_ARGUMENTS` are used.

    Returns:
        `list[str]`: Their paths, after a download if need be. Empty if the checkpoint has no safetensors.

    Raises:
        ValueError: the index is damaged, or names a file that the checkpoint does not have.
    """
    kwargs = {**kwargs, "force_download": None}  # else the weights would be downloaded twice
    whole = find_file(name, "adapter_model.safetensors" if is_adapter(name, kwargs) else "model.safetensors", kwargs)
    index = find_file(name, INDEX_NAME, kwargs)
    if whole or not index:
        return [whole] if whole else []
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(re.fullmatch(r"[\w.-]+\.safetensors", str(s)) for s in shards.values()):
        raise ValueError(f"{index} does not say which safetensors in its own folder hold the tensors (`weight_map`).")
    found = {shard: find_file(name, shard, kwargs) for shard in sorted(set(shards.values()))}
    missing = [shard for shard, file in found.items() if file is None]
    if missing:
        raise ValueError(f"{index} names {', '.join(missing)}, which {name} does not have. Save or download it again.")
    return [file for file in found.values() if file]


def commit_of(name: str | Path, kwargs: dict) -> str | None:
    """The commit of a Hub id that a `from_pretrained` with these arguments loads; None for a folder."""
    config = find_file(name, "config.json", kwargs)
    snapshot = Path(config or "").parent
    return snapshot.name if snapshot.parent.name == "snapshots" else None
