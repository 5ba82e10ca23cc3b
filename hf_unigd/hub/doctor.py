"""Examines a checkpoint: what is wrong with it, and which libraries can load it here."""

import importlib
import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from packaging.version import Version
from transformers.dynamic_module_utils import get_relative_imports
from transformers.utils import logging as transformers_logging

from ..modeling import UniGDConfig, UniGDForConditionalGeneration, UniGDProcessor
from ..modeling.hub_files_unigd import ADAPTER_CONFIG_NAME, is_adapter
from ..modeling.probe_unigd import PROBE_NAME, load_probe, probe_differences, probe_tolerance, processor_differences
from ..version import __version__
from .export import check_exportable


OK, NOTE, FAULT = "ok", "note", "FAULT"
# The code that sentence-transformers runs. Not every version has what it imports.
SENTENCE_MODULE = "hf_unigd.modeling.sentence_unigd"


@dataclass(frozen=True)
class Finding:
    """One line of the report. Its `level` is `OK`, `NOTE` (worth knowing, but not wrong) or `FAULT`."""

    subject: str
    level: str
    text: str


def examine(name: str | Path, revision: str | None = None, token: str | None = None) -> list[Finding]:
    """
    Examines a checkpoint that holds a whole model or an adapter.

    Args:
        name: A folder or Hub id.
        revision: Branch, tag or commit of a Hub id.
        token: Token of the Hub, for a private repository.

    Returns:
        What was found; [`report`] prints it.

    Raises:
        OSError: there is no such folder or repository.
        ValueError: the folder or repository holds no checkpoint of hf-unigd.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(name), revision=revision, token=token))
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    if config.get("model_type") != "unigd":
        raise ValueError(f"{name} is no checkpoint of hf-unigd: its config.json has no `model_type` of 'unigd'.")
    transformers_logging.disable_progress_bar()
    findings = _files(folder, config)
    findings += [*_attempt("config", _config, config), *_attempt("versions", _versions, config)]
    model, of_model = _load_model(folder)
    processor, of_processor = _load_processor(folder)
    findings += [*of_model, *of_processor]
    if model is not None:
        findings += _attempt("tensors", _tensors, model)
    if (folder / PROBE_NAME).is_file():
        if model is not None:
            findings += _attempt("probe", _probe_of_model, folder, model)
        if processor is not None:
            findings += _attempt("probe", _probe_of_processor, folder, processor)
    faulty = any(finding.level == FAULT for finding in findings)
    return [*findings, *_consumers(folder, model, processor, faulty)]


def report(findings: list[Finding]) -> str:
    """The findings of [`examine`] as a page of text, with the number of faults at the end."""
    width = max(len(finding.subject) for finding in findings)
    lines = [f"{finding.level:<6}{finding.subject:<{width + 2}}{finding.text}" for finding in findings]
    faults = sum(finding.level == FAULT for finding in findings)
    return "\n".join([*lines, "", "No faults." if not faults else f"{faults} fault{'s' if faults > 1 else ''}."])


def _attempt(subject: str, check: Callable[..., list[Finding]], *args) -> list[Finding]:
    """What `check` finds. An error is a finding too, so that the rest is examined all the same."""
    try:
        return check(*args)
    except Exception as error:
        return [Finding(subject, FAULT, _line(error))]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _files(folder: Path, config: dict) -> list[Finding]:
    needed = ["processor_config.json", "tokenizer.json", *_remote_code(folder, config)]
    missing = [file for file in needed if not (folder / file).is_file()]
    if all(file.name == PROBE_NAME for file in folder.glob("*.safetensors")):
        missing.append("adapter_model.safetensors" if is_adapter(folder, {}) else "model.safetensors")
    level, text = (FAULT, f"missing: {', '.join(missing)}") if missing else (OK, "complete")
    findings = [Finding("files", level, text)]
    extra = {PROBE_NAME: "nobody can tell whether it embeds as when it was saved", "README.md": "it has no model card"}
    return findings + [
        Finding("files", NOTE, f"no {file}: {why}") for file, why in extra.items() if not (folder / file).is_file()
    ]


def _remote_code(folder: Path, config: dict) -> list[str]:
    """The files of code that the Auto classes run: those that the config names, and the siblings that these import."""
    classes = [name for name in config.get("auto_map", {}).values() if "--" not in name]  # else in another repository
    files: list[str] = []
    found = [name.partition(".")[0] for name in classes]
    while found:
        file = f"{found.pop()}.py"
        if file not in files:
            files.append(file)
            found += get_relative_imports(folder / file) if (folder / file).is_file() else []
    return sorted(files)


def _config(config: dict) -> list[Finding]:
    missing = [name for name in UniGDConfig().auto_map if name not in config.get("auto_map", {})]
    if missing:
        return [Finding("config", FAULT, f"`auto_map` lacks {', '.join(missing)}: these classes cannot load it")]
    text = f"format {config.get('checkpoint_format', 1)}, backbone {config['vlm_config'].get('model_type')}, head "
    return [Finding("config", OK, f"{text}{config['head_type']} of width {config['embedding_dim']}")]


def _versions(config: dict) -> list[Finding]:
    here = {name: importlib.metadata.version(name) for name in ("transformers", "torch")}
    text = ", ".join(f"{name} {version}" for name, version in {"hf-unigd": __version__, **here}.items())
    saved = config.get("transformers_version")
    if saved and Version(saved) > Version(here["transformers"]):
        return [Finding("versions", NOTE, f"{text}; saved with the newer transformers {saved}")]
    return [Finding("versions", OK, text)]


def _load_model(folder: Path):
    try:
        model, info = UniGDForConditionalGeneration.from_pretrained(
            folder, output_loading_info=True, verify="none", dtype="auto"
        )
    except Exception as error:
        return None, [Finding("tensors", FAULT, _line(error))]
    unexpected = sorted(info["unexpected_keys"])
    if unexpected:
        return model, [Finding("tensors", FAULT, f"unexpected, and not loaded: {', '.join(unexpected)}")]
    return model, [Finding("tensors", OK, "none missing, unexpected or newly initialised")]


def _tensors(model) -> list[Finding]:
    parameters = dict(model.named_parameters())
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters.values()})
    count = sum(parameter.numel() for parameter in parameters.values())
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    findings = [
        Finding("tensors", OK, f"{count:,} parameters of {', '.join(dtypes)}; output embeddings {_tied(tied)}")
    ]
    wants_tied = model.config.vlm_config.tie_word_embeddings
    if wants_tied != tied:
        findings.append(Finding("tensors", FAULT, f"output embeddings are {_tied(tied)}, against the config"))
    broken = [name for name, parameter in parameters.items() if not torch.isfinite(parameter).all()]
    if broken:
        findings.append(Finding("tensors", FAULT, f"not finite: {', '.join(broken)}"))
    return findings


def _tied(tied: bool) -> str:
    return "tied to the input embeddings" if tied else "not tied to the input embeddings"


def _load_processor(folder: Path):
    try:
        processor = UniGDProcessor.from_pretrained(folder, verify="none")
    except Exception as error:
        return None, [Finding("processor", FAULT, _line(error))]
    prompts = ", ".join(f"{modality}: {prompt!r}" for modality, prompt in processor.prompts.items())
    if processor.embedding_position == "last_slice":
        prompts = f"none; embeds at the last slice, and an image at the {processor.image_pooling} of its tokens"
    elif processor.soft_prompts:
        prompts += f"; replaced by {len(processor.soft_prompt_ids)} soft-prompt tokens"
    return processor, [Finding("prompts", OK, prompts)]


def _probe_of_model(folder: Path, model) -> list[Finding]:
    probe = load_probe(folder / PROBE_NAME)
    differences, tolerance = probe_differences(model, probe), probe_tolerance(model, probe)
    text = ", ".join(f"{name} off by {difference:.2g}" for name, difference in differences.items())
    level = OK if max(differences.values()) <= tolerance else FAULT
    return [Finding("probe", level, f"{text}; rounding explains {tolerance:g}")]


def _probe_of_processor(folder: Path, processor) -> list[Finding]:
    changes = processor_differences(processor, load_probe(folder / PROBE_NAME))
    if not changes:
        return [Finding("probe", OK, "the same inputs as when it was saved")]
    text = f"prompts, template, tokenizer or image processor have changed: {'; '.join(changes)}"
    return [Finding("probe", FAULT, text)]


def _consumers(folder: Path, model, processor, faulty: bool) -> list[Finding]:
    """Which libraries can load the checkpoint here; `faulty` says whether the checkpoint itself has a fault."""
    for_sentences = [_no_companions(folder), _no_import(SENTENCE_MODULE)]
    obstacles: dict[str, list[str | None]] = {
        "transformers": [],
        "sentence-transformers": for_sentences,
        "MTEB": [*for_sentences, _no_import("mteb")],
        "PEFT": [_not_for_peft(folder, model)],
        "plain LLaVA": [_not_exportable(model, processor)],
    }
    findings = []
    for name, reasons in obstacles.items():
        reason = next(filter(None, reasons), "unreliable because of the faults above" if faulty else None)
        findings.append(Finding(f"for {name}", NOTE if reason else OK, reason or "will work here"))
    return findings


def _no_companions(folder: Path) -> str | None:
    missing = [file for file in ("modules.json", "sentence_unigd.py") if not (folder / file).is_file()]
    return f"no {' and no '.join(missing)}" if missing else None


def _no_import(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # old versions fail in other ways than with an ImportError
        return f"cannot be imported here: {_line(error)}"
    return None


def _not_for_peft(folder: Path, model) -> str | None:
    if not is_adapter(folder, {}):
        return "a whole checkpoint, not an adapter"
    if model is None:  # reported as a fault, which the base model may have caused
        return None
    adapter = json.loads((folder / ADAPTER_CONFIG_NAME).read_text(encoding="utf-8"))
    base, _ = UniGDConfig.get_config_dict(adapter["base_model_name_or_path"], revision=adapter.get("revision"))
    if base["model_type"] == UniGDConfig.model_type:
        return None
    return f"`AutoPeftModel` refuses it, as a plain {base['model_type']} has no place for the head; use `AutoModel`"


def _not_exportable(model, processor) -> str | None:
    if model is None or processor is None:  # reported as a fault
        return None
    try:
        check_exportable(model, processor, "llava")
    except ValueError as error:
        return _line(error)
    return None
