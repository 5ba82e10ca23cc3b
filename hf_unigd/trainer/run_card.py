"""The model card of a training run."""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard
from peft import PeftModel
from peft.utils.constants import DUMMY_TARGET_MODULES
from transformers import Trainer

from ..hub.cards import CURVES_NAME, RETRIEVAL_NAME, is_hub_id, make_model_card
from ..outputs import writing


# Arguments that name paths, accounts or loggers. They do not affect the weights and may be private.
PRIVATE = re.compile(
    "token|dir|folder|path|file|cache|name|hub|log|report|save|push|resume|trackio|config|tqdm|project"
)
LOSSES = {"contrastive": "InfoNCE", "alignment": "structure", "causal_lm": "next-token"}
NOT_METRICS = ("runtime", "per_second", "_time", "_loss", "model_preparation")


def make_run_card(
    trainer: Trainer,
    repo_id: str | None = None,
    dataset_name: str | None = None,
    evaluation_dataset_name: str | None = None,
    license: str | None = None,
) -> ModelCard:
    """
    Makes the model card of a [`UniGDTrainer`]. If matplotlib is installed, a figure of the losses is written to the
    output folder.

    Args:
        trainer: The trainer, after training.
        repo_id: Repository that the model will be in. Defaults to `hub_model_id`, or the name of the output folder.
        dataset_name: Hub id or name of the training data.
        evaluation_dataset_name: Hub id or name of the evaluation data. Defaults to `dataset_name`. Without either, the
            card has no metrics, because the Hub's metadata needs the name.
        license: Licence of the weights.
    """
    args, folder = trainer.args, Path(trainer.args.output_dir)
    repo_id = repo_id or trainer.hub_model_id or folder.name
    is_adapter = isinstance(trainer.model, PeftModel)
    base = _base_model(trainer.model)
    datasets = [dataset_name] if dataset_name and is_hub_id(dataset_name) else []
    weights = {"vladva": args.contrastive_weight, "sugar": args.alignment_weight}
    methods = [method for method, weight in weights.items() if weight]
    objective = " + ".join(
        f"{getattr(args, f'{name}_weight'):g} · {loss}"
        for name, loss in LOSSES.items()
        if getattr(args, f"{name}_weight")
    )
    origin = base if is_hub_id(base) else "a model that is not on the Hub"
    evaluated = evaluation_dataset_name or dataset_name
    return make_model_card(
        repo_id=repo_id,
        title=repo_id.rpartition("/")[2],
        summary=f"{'an adapter on ' if is_adapter else ''}{origin}, trained with {objective}.",
        training={"objective": objective, **_settings(trainer), "hardware": _hardware(args), **_versions()},
        limits="Not described yet. The training run wrote this card and knows only its settings and metrics.",
        dataset=Path(evaluated).name if evaluated and not is_hub_id(evaluated) else evaluated,
        metrics=_metrics(trainer.state.log_history) if evaluated else {},
        methods=methods or ["vladva"],
        base_model=base if is_hub_id(base) else None,
        base_model_relation="adapter" if is_adapter else "finetune",
        datasets=datasets,
        license=license,
        curves_picture=draw_curves(trainer.state.log_history, folder / CURVES_NAME),
        retrieval_picture=RETRIEVAL_NAME if (folder / RETRIEVAL_NAME).is_file() else None,
    )


def draw_curves(log_history: list[Mapping[str, Any]], file: Path) -> str | None:
    """Draws every logged loss over the steps. Returns the name of `file`, or `None` without matplotlib or losses."""
    names = sorted({name for entry in log_history for name in entry if name in {f"{loss}_loss" for loss in LOSSES}})
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    if not names:
        return None
    figure = Figure(figsize=(3.4 * len(names), 2.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        points = [(entry["step"], entry[name]) for entry in log_history if name in entry]
        axes.plot(*zip(*points, strict=True))
        axes.set(title=name, xlabel="step")
    with writing(file) as unfinished:
        figure.savefig(unfinished, dpi=120, format="png")
    return file.name


def _base_model(model) -> str | None:
    if isinstance(model, PeftModel):
        return model.peft_config[model.active_adapter].base_model_name_or_path
    return model.name_or_path or None


def _settings(trainer: Trainer) -> dict[str, object]:
    """Returns the settings of the run, the adapter and the prompts, and every argument that is a loss weight or not at
    its default, except private ones."""
    args, model, processor = trainer.args, trainer.model, trainer.processing_class
    settings: dict[str, object] = {
        "steps": trainer.state.global_step,
        "epochs": f"{trainer.state.epoch or 0:.2f}",
        "global batch": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "head": f"{model.config.head_type}, {model.config.embedding_dim} wide",
        "embedded at": processor.embedding_position,
        "prompts": "trained tokens" if processor.soft_prompts else " / ".join(processor.prompts.values()),
    }
    settings |= {f"instruction of {name}": text for name, text in processor.instructions.items()}
    if isinstance(model, PeftModel):
        lora = model.peft_config[model.active_adapter]
        adapts = lora.target_modules != DUMMY_TARGET_MODULES
        settings["LoRA"] = f"r {lora.r}, alpha {lora.lora_alpha}, dropout {lora.lora_dropout}" if adapts else "none"
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        is_weight = field.name.endswith("_weight")
        if (value == default and not is_weight) or PRIVATE.search(field.name):
            continue
        if isinstance(value, (bool, int, float)) or (isinstance(value, str) and not _is_path(value)):
            settings[field.name] = str(value.value) if hasattr(value, "value") else value
    seconds = next((entry["train_runtime"] for entry in trainer.state.log_history if "train_runtime" in entry), None)
    if seconds is not None:
        settings["hours"] = f"{seconds / 3600:.2f}"
    return settings


def _is_path(value: str) -> bool:
    return Path(value).is_absolute() or Path(value).exists() or "\\" in value


def _hardware(args) -> str:
    if torch.cuda.is_available() and args.device.type == "cuda":
        return f"{args.world_size} x {torch.cuda.get_device_name(args.device)}"
    return f"{args.world_size} x {args.device.type}, {os.cpu_count()} cores"


def _versions() -> dict[str, object]:
    return {"transformers": transformers.__version__, "torch": torch.__version__}


def _metrics(log_history: list[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the metrics of the last evaluation, without losses and timings."""
    for entry in reversed(log_history):
        metrics = {
            name.removeprefix("eval_"): value
            for name, value in entry.items()
            if name.startswith("eval_") and not any(part in name for part in NOT_METRICS)
        }
        if metrics:
            return metrics
    return {}
