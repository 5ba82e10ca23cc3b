"""What is wrong with a checkpoint, and which of its consumers will work here, on one page."""

import importlib.metadata
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from packaging.version import Version
from transformers.utils import logging as transformers_logging

from ..modeling import UniGDForConditionalGeneration, UniGDProcessor
from ..modeling.probe_unigd import PROBE_NAME, load_probe, probe_difference, probe_tolerance, processor_differences
from ..version import __version__


OK, NOTE, FAULT = "ok", "note", "FAULT"
REMOTE_CODE = (
    "adapter_unigd.py",
    "configuration_unigd.py",
    "modeling_unigd.py",
    "probe_unigd.py",
    "processing_unigd.py",
)
AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor")


@dataclass(frozen=True)
class Finding:
    """One line of the report: `level` is `OK`, `NOTE` (works, but know it) or `FAULT`."""

    subject: str
    level: str
    text: str


def examine(name: str | Path, revision: str | None = None, token: str | None = None) -> list[Finding]:
    """
    Examines a whole checkpoint (not an adapter alone).

    Args:
        name: A folder or Hub id.
        revision: Branch, tag or commit of a Hub id.
        token: For a private repository.

    Raises:
        OSError: there is no such folder or repository.
        ValueError: it is no checkpoint of ours.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(name), revision=revision, token=token))
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    if config.get("model_type") != "unigd":
        raise ValueError(f"{name} is no checkpoint of hf-unigd: its config.json has no `model_type` of 'unigd'.")
    transformers_logging.disable_progress_bar()
    findings = [*_files(folder), *_config(config), *_versions(config)]
    model, of_model = _load_model(folder)
    processor, of_processor = _load_processor(folder)
    findings += [*of_model, *of_processor]
    if model is not None:
        findings += [*_tensors(model, config), *_probe(folder, model, processor)]
    return [*findings, *_consumers(folder, config)]


def report(findings: list[Finding]) -> str:
    width = max(len(finding.subject) for finding in findings)
    lines = [f"{finding.level:<6}{finding.subject:<{width + 2}}{finding.text}" for finding in findings]
    faults = sum(finding.level == FAULT for finding in findings)
    return "\n".join([*lines, "", "No faults." if not faults else f"{faults} fault{'s' if faults > 1 else ''}."])


def _files(folder: Path) -> list[Finding]:
    needed = ["processor_config.json", "tokenizer.json", *REMOTE_CODE]
    missing = [file for file in needed if not (folder / file).is_file()]
    if not [*folder.glob("*.safetensors")] or all(file.name == PROBE_NAME for file in folder.glob("*.safetensors")):
        missing.append("model.safetensors")
    level, text = (FAULT, f"missing: {', '.join(missing)}") if missing else (OK, "complete")
    findings = [Finding("files", level, text)]
    extra = {PROBE_NAME: "nobody can tell whether it embeds as it did", "README.md": "it has no model card"}
    return findings + [
        Finding("files", NOTE, f"no {file}: {why}") for file, why in extra.items() if not (folder / file).is_file()
    ]


def _config(config: dict) -> list[Finding]:
    missing = [name for name in AUTO_CLASSES if name not in config.get("auto_map", {})]
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
            folder, output_loading_info=True, check_probe=False, dtype="auto"
        )
    except Exception as error:  # whatever is wrong with it is what was asked for
        return None, [Finding("tensors", FAULT, " ".join(str(error).split()))]
    unexpected = sorted(info["unexpected_keys"])
    if unexpected:
        return model, [Finding("tensors", FAULT, f"unexpected, and not loaded: {', '.join(unexpected)}")]
    return model, [Finding("tensors", OK, "none missing, unexpected or newly initialised")]


def _tensors(model, config: dict) -> list[Finding]:
    parameters = dict(model.named_parameters())
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters.values()})
    count = sum(parameter.numel() for parameter in parameters.values())
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    findings = [
        Finding("tensors", OK, f"{count:,} parameters of {', '.join(dtypes)}; output embeddings {_tied(tied)}")
    ]
    wants_tied = model.config.vlm_config.tie_word_embeddings
    if wants_tied != tied:
        findings.append(Finding("tensors", FAULT, f"output embeddings are {_tied(tied)}, the config says otherwise"))
    broken = [name for name, parameter in parameters.items() if not torch.isfinite(parameter).all()]
    if broken:
        findings.append(Finding("tensors", FAULT, f"not finite: {', '.join(broken)}"))
    return findings


def _tied(tied: bool) -> str:
    return "tied to the input's" if tied else "of their own"


def _load_processor(folder: Path):
    try:
        processor = UniGDProcessor.from_pretrained(folder, check_probe=False)
    except Exception as error:
        return None, [Finding("processor", FAULT, " ".join(str(error).split()))]
    prompts = ", ".join(f"{modality}: {prompt!r}" for modality, prompt in processor.prompts.items())
    if processor.embedding_position == "last_slice":
        prompts = f"none, embeds at the last slice, images by the {processor.image_pooling} of their tokens"
    elif processor.soft_prompts:
        prompts += f"; as {len(processor.soft_prompt_ids)} soft-prompt tokens"
    return processor, [Finding("prompts", OK, prompts)]


def _probe(folder: Path, model, processor) -> list[Finding]:
    if not (folder / PROBE_NAME).is_file():
        return []
    probe = load_probe(folder / PROBE_NAME)
    difference, tolerance = probe_difference(model, probe), probe_tolerance(model, probe)
    level = OK if difference <= tolerance else FAULT
    findings = [
        Finding("probe", level, f"embeddings and logits off by {difference:.2g}; rounding explains {tolerance:g}")
    ]
    if processor is not None:
        try:
            changes = processor_differences(processor, probe)
        except Exception as error:
            changes = [" ".join(str(error).split())]
        text = f"prompts, template, tokenizer or image processor changed: {'; '.join(changes)}"
        findings.append(Finding("probe", FAULT if changes else OK, text if changes else "the same inputs as then"))
    return findings


def _consumers(folder: Path, config: dict) -> list[Finding]:
    backbone = config["vlm_config"].get("model_type")
    companions = (folder / "modules.json").is_file() and (folder / "sentence_unigd.py").is_file()
    checks: list[tuple[str, str | None, Callable[[], str | None]]] = [
        ("transformers", "transformers", lambda: None),
        ("sentence-transformers", "sentence_transformers", lambda: None if companions else "no modules.json"),
        ("MTEB", "mteb", lambda: None if companions else "no modules.json"),
        ("PEFT", "peft", lambda: None),
        ("plain LLaVA", None, lambda: None if backbone == "llava" else f"the backbone is {backbone}"),
    ]
    findings = []
    for name, package, obstacle in checks:
        missing = package is not None and importlib.util.find_spec(package) is None
        reason = f"{package} is not installed here" if missing else obstacle()
        findings.append(Finding(f"for {name}", NOTE if reason else OK, reason or "will work here"))
    return findings
