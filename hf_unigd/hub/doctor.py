"""Examines a checkpoint: what is wrong with it, and which libraries can load it here."""

import importlib
import importlib.metadata
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from packaging.version import Version
from transformers.utils import logging as transformers_logging

from ..modeling import UniGDConfig, UniGDForConditionalGeneration, UniGDProcessor
from ..modeling.hub_files_unigd import ADAPTER_CONFIG_NAME, is_adapter, read_json
from ..modeling.probe_unigd import PROBE_NAME, load_probe, probe_differences, probe_tolerance, processor_differences
from ..modeling.sentence_files_unigd import SENTENCE_CONFIG_NAME
from ..version import __version__
from .doctor_files import examine_files
from .export import check_exportable
from .findings import FAULT, NOTE, OK, Finding, attempt, line
from .limits import limited


# The code that sentence-transformers runs. Not every version has what it imports.
SENTENCE_MODULE = "hf_unigd.modeling.sentence_unigd"
# For a few words and small images. A chat template is a program, which may run for days.
PROCESSOR_SECONDS, PROCESSOR_GIGABYTES = 30, 4
PROCESSOR_IS_SLOW = "the processor takes too long for a few words and small images: see its chat template"


def examine(name: str | Path, revision: str | None = None, token: str | None = None) -> list[Finding]:
    """
    Examines a checkpoint that holds a whole model or an adapter.

    Args:
        name: A folder or Hub id.
        revision: Branch, tag or commit of a Hub id.
        token: Token of the Hub, for a private repository.

    Returns:
        What was found; [`report`] prints it. Whatever is wrong with the checkpoint is a part of it, never an error.

    Raises:
        OSError: there is no such folder or repository.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(name), revision=revision, token=token))
    transformers_logging.disable_progress_bar()
    findings, config = examine_files(folder)
    if config is None:
        return findings
    findings += [*attempt("config", _config, config), *attempt("versions", _versions, config)]
    model, of_model = _load_model(folder)
    processor, of_processor = _load_processor(folder)
    findings += [*of_model, *of_processor]
    if processor is not None:
        findings += attempt("instructions", _instructions, folder, processor)
    if model is not None:
        findings += attempt("tensors", _tensors, model)
    if (folder / PROBE_NAME).is_file():
        if model is not None:
            findings += attempt("probe", _probe_of_model, folder, model)
        if processor is not None:
            findings += attempt("probe", _probe_of_processor, folder, processor)
    faulty = any(finding.level == FAULT for finding in findings)
    return [*findings, *attempt("consumers", _consumers, folder, model, processor, faulty)]


def report(findings: list[Finding]) -> str:
    """The findings of [`examine`] as a page of text, with the number of faults at the end."""
    width = max(len(finding.subject) for finding in findings)
    lines = [f"{finding.level:<6}{finding.subject:<{width + 2}}{finding.text}" for finding in findings]
    faults = sum(finding.level == FAULT for finding in findings)
    return "\n".join([*lines, "", "No faults." if not faults else f"{faults} fault{'s' if faults > 1 else ''}."])


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
        return None, [Finding("tensors", FAULT, line(error))]
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
        with limited(PROCESSOR_SECONDS, PROCESSOR_GIGABYTES, PROCESSOR_IS_SLOW):
            processor = UniGDProcessor.from_pretrained(folder, verify="none")
    except Exception as error:
        return None, [Finding("processor", FAULT, line(error))]
    return processor, attempt("prompts", _prompts, processor)


def _prompts(processor) -> list[Finding]:
    prompts = ", ".join(f"{modality}: {prompt!r}" for modality, prompt in processor.prompts.items())
    if processor.embedding_position == "last_slice":
        prompts = f"none; embeds at the last slice, and an image at the {processor.image_pooling} of its tokens"
    elif processor.soft_prompts:
        prompts += f"; replaced by {len(processor.soft_prompt_ids)} soft-prompt tokens"
    return [Finding("prompts", OK, prompts)]


def _instructions(folder: Path, processor) -> list[Finding]:
    """The named instructions, which sentence-transformers reads from a file of its own."""
    if not (folder / SENTENCE_CONFIG_NAME).is_file():
        return []
    prompts = read_json(folder / SENTENCE_CONFIG_NAME).get("prompts") or {}
    for_sentences = {name: text.strip() for name, text in prompts.items() if text}
    if for_sentences != processor.instructions:
        text = f"{SENTENCE_CONFIG_NAME} has the prompts {for_sentences}, and the processor {processor.instructions}"
        return [Finding("instructions", FAULT, f"{text}: sentence-transformers would give other embeddings")]
    listed = ", ".join(f"{name}: {text!r}" for name, text in processor.instructions.items())
    return [Finding("instructions", OK, listed)] if listed else []


def _probe_of_model(folder: Path, model) -> list[Finding]:
    probe = load_probe(folder / PROBE_NAME)
    differences, tolerance = probe_differences(model, probe), probe_tolerance(model, probe)
    text = ", ".join(f"{name} off by {difference:.2g}" for name, difference in differences.items())
    level = OK if max(differences.values()) <= tolerance else FAULT
    return [Finding("probe", level, f"{text}; rounding explains {tolerance:g}")]


def _probe_of_processor(folder: Path, processor) -> list[Finding]:
    with limited(PROCESSOR_SECONDS, PROCESSOR_GIGABYTES, PROCESSOR_IS_SLOW):
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
    if missing:
        return f"no {' and no '.join(missing)}"
    modules = [module["type"] for module in read_json(folder / "modules.json", list)]
    if len(modules) != 1 or not modules[0].endswith("sentence_unigd.UniGDSentenceModule"):
        return f"modules.json names {', '.join(modules)} instead of sentence_unigd.UniGDSentenceModule"
    return None


def _no_import(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # old versions fail in other ways than with an ImportError
        return f"cannot be imported here: {line(error)}"
    return None


def _not_for_peft(folder: Path, model) -> str | None:
    if not is_adapter(folder, {}):
        return "a whole checkpoint, not an adapter"
    if model is None:  # reported as a fault, which the base model may have caused
        return None
    adapter = read_json(folder / ADAPTER_CONFIG_NAME)
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
        return line(error)
    return None
