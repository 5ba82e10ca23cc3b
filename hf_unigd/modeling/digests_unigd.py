"""The digests: a file with the SHA-256 of every tensor of a checkpoint, and of every file of its code and processor.

They show that a checkpoint is what was saved, to the last bit. They do not show who saved it: whoever can change a
file of a repository can change the digests with it.
"""

import hashlib
import json
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .hub_files_unigd import find_file, read_json, weight_files
from .probe_unigd import PROBE_NAME


DIGESTS_NAME = "digests.json"
# How much a load checks. Each checks what those before it check too.
VERIFY = ("none", "probe", "digests")
# The files that decide what a checkpoint computes, beside its weights. Those of sentence-transformers are not here,
# because that library writes them anew.
DIGESTED_FILES = (
    *("config.json", "generation_config.json", "adapter_config.json", PROBE_NAME, "*_unigd.py"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "tekken.json"),
)


def save_digests(folder: str | Path) -> None:
    """
    Writes the digests of a checkpoint, as it is now, into its folder. Saving a model or an adapter does this; whoever
    changes a file by hand afterwards calls it again.

    Args:
        folder (`str` or `os.PathLike`): The checkpoint's folder.

    Raises:
        ValueError: the weights cannot be read.
    """
    _write(folder, _digests_of_files(Path(folder)), digests_of_tensors(weight_files(folder, {})))


def renew_digests_of_files(folder: str | Path) -> None:
    """As [`save_digests`] after some of the files were saved again, but not the weights. Does nothing if the folder
    has no digests."""
    if (Path(folder) / DIGESTS_NAME).is_file():
        _write(folder, _digests_of_files(Path(folder)), _read(Path(folder) / DIGESTS_NAME)["tensors"])


def check_digests(name, kwargs: dict, with_tensors: bool = True) -> None:
    """
    Compares a checkpoint with its digests.

    Args:
        name (`str` or `os.PathLike`): Folder or Hub id of the checkpoint.
        kwargs: Arguments of a `from_pretrained`, which say where the checkpoint is.
        with_tensors (`bool`, *optional*, defaults to `True`): Whether to compare the tensors too, for which the
            weights are read once.

    Raises:
        ValueError: the checkpoint has no digests, or they are damaged.
        RuntimeError: a file or tensor differs from them; the message names each.
    """
    file = find_file(name, DIGESTS_NAME, kwargs)
    if file is None:
        raise ValueError(
            f"{name} has no {DIGESTS_NAME}, so `verify='digests'` cannot compare it with what was saved. An older "
            "hf-unigd or another library saved it. Load it with `verify='probe'`; saving it again adds the digests."
        )
    for other in _read(file)["files"]:  # on the Hub, what this load has not needed yet
        find_file(name, other, kwargs)
    differences = digest_differences(Path(file).parent, weight_files(name, kwargs) if with_tensors else None)
    if differences:
        raise RuntimeError(
            f"{name} is not what was saved: {'; '.join(differences)}. Download or save it again. If the change is "
            "meant, `hf_unigd.hub.save_digests(folder)` records it, and `verify='probe'` loads it as it is."
        )


def digest_differences(folder: str | Path, weights: Iterable[str | Path] | None) -> list[str]:
    """
    Describes how a checkpoint differs from its digests. The list is empty if it does not.

    Args:
        folder (`str` or `os.PathLike`): The checkpoint's folder, which has digests.
        weights (`Iterable[str]`, *optional*): The files with its tensors. With None, tensors are not compared.

    Raises:
        ValueError: the digests are damaged, or a file of weights is.
    """
    saved = _read(Path(folder) / DIGESTS_NAME)
    now = {"files": _digests_of_files(Path(folder))}
    if weights is not None:
        now["tensors"] = digests_of_tensors(weights)
    differences = []
    for kind, digests in now.items():
        before = saved[kind]
        changes = {
            "changed": [name for name in digests if before.get(name, digests[name]) != digests[name]],
            "missing": sorted(before.keys() - digests.keys()),
            "added": sorted(digests.keys() - before.keys()),
        }
        differences += [f"{kind} {change}: {_listed(names)}" for change, names in changes.items() if names]
    return differences


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"{', '.join(names[:10])}{more}"


def digests_of_tensors(files: Iterable[str | Path]) -> dict[str, str]:
    """
    The digest of every tensor in some files, by name: the SHA-256 of its data type and shape, as `["F32", [2, 3]]`,
    and of its bytes. It does not depend on how the tensors are spread over files.

    Raises:
        ValueError: a file is damaged.
    """
    digests = {}
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - it is no dict
                    header = tensors.get_slice(name)
                    digest = hashlib.sha256(json.dumps([header.get_dtype(), header.get_shape()]).encode())
                    digest.update(tensors.get_tensor(name).reshape(-1).view(torch.uint8).numpy())
                    digests[name] = digest.hexdigest()
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}. Save or download it again.") from error
    return digests


def _digests_of_files(folder: Path) -> dict[str, str]:
    files = {file for pattern in DIGESTED_FILES for file in folder.glob(pattern) if file.is_file()}
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files)
    }


def _read(file: str | Path) -> dict[str, dict[str, str]]:
    """
    Raises:
        ValueError: the file does not hold digests, or holds some of files that a checkpoint is not made of.
    """
    digests = read_json(file)
    is_whole = all(isinstance(digests.get(kind), dict) for kind in ("files", "tensors"))
    # Names from elsewhere could be paths to files outside the checkpoint.
    if not is_whole or not all(any(fnmatch(name, each) for each in DIGESTED_FILES) for name in digests["files"]):
        raise ValueError(f"{file} does not hold the digests of a checkpoint. Save or download the checkpoint again.")
    return digests


def _write(folder: str | Path, files: dict[str, str], tensors: dict[str, str]) -> None:
    text = json.dumps({"files": files, "tensors": tensors}, indent=2, sort_keys=True)
    (Path(folder) / DIGESTS_NAME).write_text(f"{text}\n", encoding="utf-8")
