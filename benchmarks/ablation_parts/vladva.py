"""Arms of VladVA: LoRA and soft prompts on captioned scenes."""

from pathlib import Path
from typing import Any

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor

from . import records
from .arms import Arm
from .corpus import QUESTIONS, Columns, scenes
from .measuring import measure, validate
from .training import Trained, as_embedder, tune_model


__all__ = ["measure", "settings", "train", "validate"]

STEPS, BATCH_SIZE = 100, 128
# Prompts to choose from: what the base model was asked, and VladVA's.
PROMPTS = (*(each for questions in QUESTIONS.values() for each in questions), "Summarize the provided {} in one word")


def columns(arm: Arm) -> dict[str, str]:
    """The columns of scenes that an arm is trained on."""
    predicted = {"long_caption": "long_caption"} if arm.next_token else {}
    return {"image": "image", "short_caption": arm.positive, **predicted}


def load(folder: Path, prompt: str) -> tuple[UniGDForConditionalGeneration, UniGDProcessor]:
    """The base model, which embeds at the end of a prompt. "{}" in the prompt becomes what is embedded."""
    model = UniGDForConditionalGeneration.from_vlm_pretrained(str(folder))
    prompts = {modality: prompt.format(modality) for modality in ("image", "text")}
    return model, UniGDProcessor.from_vlm_pretrained(str(folder), prompts)


def best_prompt(folder: Path) -> str:
    """The prompt with the best recall on the validation scenes. All are tried once, and kept in `prompts.json`."""
    file = records.RESULTS / "prompts.json"
    own = records.digest(folder / "model.safetensors")
    record = records.read(file)
    if record.get("base") != own:
        record = {"base": own, "validation": {}}
    for prompt in PROMPTS:
        if prompt not in record["validation"]:
            record["validation"][prompt] = validate(as_embedder(*load(folder, prompt)))
            print(f"prompt {prompt!r}: {record['validation'][prompt]:.3f}", flush=True)
            records.write(file, record)
    return max(record["validation"], key=record["validation"].get)


def settings(arm: Arm, folder: Path) -> dict[str, Any]:
    return {"prompt": best_prompt(folder), "steps": STEPS, "batch_size": BATCH_SIZE}


def train(arm: Arm, seed: int, learning_rate: float | None, folder: Path, rows: Any = None, **given: Any) -> Trained:
    """
    Trains an arm.

    Args:
        arm: The arm.
        seed: Seed of the adapter's weights and of the order of the rows.
        learning_rate: Learning rate; None for an arm in which nothing is trained.
        folder: The base model.
        rows: Scenes to train on; by default, those of the training split.
        given: [`settings`], if not those of the study.
    """
    chosen = given or settings(arm, folder)
    model, processor = load(folder, chosen["prompt"])
    if learning_rate is None:
        return as_embedder(model, processor), []
    if arm.soft_prompts:
        model.add_soft_prompts(**processor.add_soft_prompts())
    return tune_model(
        model,
        processor,
        Columns(scenes("train") if rows is None else rows, columns(arm)),
        seed,
        learning_rate,
        chosen["steps"],
        chosen["batch_size"],
        lora=arm.lora,
        contrastive_weight=arm.contrastive,
        causal_lm_weight=arm.next_token,
    )
