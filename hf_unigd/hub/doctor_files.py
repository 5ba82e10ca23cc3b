"""Examines the files of a checkpoint without running any of them: whether they can be read, are what was saved, and
which code they name."""

from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_imports

from .. import modeling
from ..modeling.digests_unigd import DIGESTS_NAME, digest_differences
from ..modeling.hub_files_unigd import is_adapter, read_json, weight_files
from ..modeling.probe_unigd import PROBE_NAME
from ..version import __version__
from .findings import FAULT, NOTE, OK, Finding, attempt, line
from .pushing import CHECKPOINT_FILES


CODE = Path(modeling.__file__).parent


def examine_files(folder: Path) -> tuple[list[Finding], dict | None]:
    """
    Examines the files of a checkpoint.

    Args:
        folder: The checkpoint's folder.

    Returns:
        What was found, and what `config.json` holds: None if it is not the config of a checkpoint of ours, so that
        there is nothing more to examine.
    """
    contents, findings = _read(folder)
    config = contents.get("config.json", {})
    if config.get("model_type") != "unigd":
        text = f"{folder} is no checkpoint of hf-unigd: its config.json has no `model_type` of 'unigd'"
        return [*findings, Finding("config", FAULT, text)], None
    findings += attempt("files", _complete, folder, config)
    findings += attempt("digests", _digests, folder)
    findings += attempt("code", _code, folder, contents)
    return findings, config


def _read(folder: Path) -> tuple[dict[str, Any], list[Finding]]:
    """The content of each JSON file by its name, and the files that cannot be read."""
    contents: dict[str, Any] = {}
    findings = []
    for file in sorted(folder.iterdir()):
        if not any(fnmatch(file.name, pattern) for pattern in CHECKPOINT_FILES):
            continue
        try:
            if not file.is_file():
                raise ValueError(f"{file.name} is no file" + ", but a link to none" * file.is_symlink())
            if file.suffix == ".json":
                contents[file.name] = read_json(file, list if file.name == "modules.json" else dict)
            elif file.suffix in (".py", ".jinja", ".txt", ".md"):
                file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            named = line(error) if file.name in str(error) else f"{file.name}: {line(error)}"
            findings.append(Finding("files", FAULT, named))
    return contents, findings


def _complete(folder: Path, config: dict) -> list[Finding]:
    needed = ["processor_config.json", "tokenizer.json", *_remote_code(folder, config)]
    missing = [file for file in needed if not (folder / file).is_file()]
    if not weight_files(folder, {}):
        missing.append("adapter_model.safetensors" if is_adapter(folder, {}) else "model.safetensors")
    level, text = (FAULT, f"missing: {', '.join(missing)}") if missing else (OK, "complete")
    extra = {PROBE_NAME: "nobody can tell whether it embeds as when it was saved", "README.md": "it has no model card"}
    absent = [
        Finding("files", NOTE, f"no {file}: {why}") for file, why in extra.items() if not (folder / file).exists()
    ]
    return [Finding("files", level, text), *absent]


def _remote_code(folder: Path, config: dict) -> list[str]:
    """The files of code that the Auto classes run: those that the config names, and the siblings that these import."""
    files: list[str] = []
    found = [name.partition(".")[0] for name in _code_references(config) if "--" not in name]
    while found:
        file = f"{found.pop()}.py"
        if file not in files:
            files.append(file)
            found += get_relative_imports(folder / file) if (folder / file).is_file() else []
    return sorted(files)


def _digests(folder: Path) -> list[Finding]:
    if not (folder / DIGESTS_NAME).is_file():
        text = f"no {DIGESTS_NAME}: nobody can tell whether every file and tensor is as it was saved"
        return [Finding("digests", NOTE, text)]
    differences = digest_differences(folder, weight_files(folder, {}))
    if not differences:
        return [Finding("digests", OK, "every tensor and every file of code and processor is as it was saved")]
    return [Finding("digests", FAULT, f"not as it was saved: {difference}") for difference in differences]


def _code(folder: Path, contents: dict[str, Any]) -> list[Finding]:
    findings = [
        Finding("code", FAULT, f"{name} points to the code of another repository, {reference!r}")
        for name, content in contents.items()
        for reference in _code_references(content)
        if "--" in reference
    ]
    saved = {file.name: file.read_bytes() for file in folder.glob("*_unigd.py") if file.is_file()}
    other = [name for name, code in saved.items() if not (CODE / name).is_file() or (CODE / name).read_bytes() != code]
    if other:
        text = f"{', '.join(sorted(other))} differ from those of hf-unigd {__version__}, which is installed here"
        findings.append(Finding("code", NOTE, f"{text}: another version saved them, or they were edited"))
    return findings or [Finding("code", OK, f"that of hf-unigd {__version__}, which is installed here")]


def _code_references(content) -> Iterator[str]:
    """The classes that a JSON file of a checkpoint makes transformers or sentence-transformers load: the texts in its
    `auto_map` and `custom_pipelines`, or the types of its modules."""
    keys = ("type",) if isinstance(content, list) else ("auto_map", "custom_pipelines")
    found = [(False, content)]
    while found:
        is_reference, value = found.pop()
        if isinstance(value, dict):
            found += [(is_reference or key in keys, each) for key, each in value.items()]
        elif isinstance(value, list):
            found += [(is_reference, each) for each in value]
        elif is_reference and isinstance(value, str) and "." in value:
            yield value
