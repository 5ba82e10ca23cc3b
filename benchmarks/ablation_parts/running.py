"""Runs an arm: the base model is tuned as a user would, with a LoRA configuration and soft prompts."""

import tempfile
import time
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch.utils import data

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor, UniGDTrainer, UniGDTrainingArguments

from . import base, records
from .arms import ARMS, Arm
from .corpus import QUESTIONS, scenes
from .measuring import measure, validate
from .precision import fast_products


STEPS, BATCH_SIZE = 100, 128
LEARNING_RATES = (1e-3, 3e-3, 1e-2)
TUNING_SEED = 100  # not one of those that are reported
# Prompts to choose from: what the base model was asked, and VladVA's.
PROMPTS = (*(each for questions in QUESTIONS.values() for each in questions), "Summarize the provided {} in one word")


class Captioned(data.Dataset):
    """The columns of scenes that an arm is trained on."""

    def __init__(self, rows: Any, arm: Arm):
        self.rows = rows
        self.columns = {"image": "image", "short_caption": arm.positive}
        if arm.next_token:
            self.columns["long_caption"] = "long_caption"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        row = self.rows[place]
        return {own: row[name] for own, name in self.columns.items()}


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
        record = {"base": own, "recall_at_1": {}}
    for prompt in PROMPTS:
        if prompt not in record["recall_at_1"]:
            record["recall_at_1"][prompt] = validate(*load(folder, prompt))
            print(f"prompt {prompt!r}: {record['recall_at_1'][prompt]:.3f}", flush=True)
            records.write(file, record)
    return max(record["recall_at_1"], key=record["recall_at_1"].get)


def train(
    arm: Arm, seed: int, learning_rate: float, prompt: str, folder: Path = base.FOLDER, steps: int = STEPS, rows=None
) -> tuple[UniGDForConditionalGeneration, UniGDProcessor, list[dict[str, float]]]:
    """
    Trains an arm.

    Args:
        arm: The arm.
        seed: Seed of the adapter's weights and of the order of the rows.
        learning_rate: Learning rate of AdamW.
        prompt: The prompt by hand.
        folder: The base model.
        steps: Number of steps of `BATCH_SIZE` rows.
        rows: Scenes to train on; by default, those of the training split.

    Returns:
        The model, into which the adapter is merged, its processor, and the losses that were logged.
    """
    model, processor = load(folder, prompt)
    if not arm.is_trained:
        return model, processor, []
    if arm.soft_prompts:
        model.add_soft_prompts(**processor.add_soft_prompts())
    with tempfile.TemporaryDirectory() as output:
        trainer = UniGDTrainer(
            model,
            UniGDTrainingArguments(
                output_dir=output,
                max_steps=steps,
                per_device_train_batch_size=BATCH_SIZE,
                learning_rate=learning_rate,
                warmup_steps=0.1,
                contrastive_weight=arm.contrastive,
                causal_lm_weight=arm.next_token,
                trust_caption_columns=True,  # a long caption of a scene is three short sentences
                check_rows="off",  # the rows are drawn in code
                seed=seed,
                save_strategy="no",
                logging_steps=10,
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=Captioned(scenes("train") if rows is None else rows, arm),
            processing_class=processor,
            peft_config=LoraConfig(r=16, lora_alpha=16, target_modules=None if arm.lora else []),
        )
        with fast_products():
            trainer.train()
    losses = [
        {name: round(value, 5) for name, value in each.items() if name == "step" or name.endswith("_loss")}
        for each in trainer.state.log_history
        if "contrastive_loss" in each or "causal_lm_loss" in each
    ]
    return trainer.model.merge_and_unload(), processor, losses


def tune(name: str, folder: Path = base.FOLDER) -> float:
    """The learning rate of an arm that gives the best recall on the validation scenes. Those that were tried are kept,
    and not tried again."""
    own = records.digest(folder / "model.safetensors")
    record = records.read(records.tuning_file(name))
    if record.get("base") != own:
        record = {"arm": name, "seed": TUNING_SEED, "steps": STEPS, "base": own, "recall_at_1": {}}
    prompt = best_prompt(folder)
    for rate in LEARNING_RATES:
        if str(rate) not in record["recall_at_1"]:
            model, processor, _ = train(ARMS[name], TUNING_SEED, rate, prompt, folder)
            record["recall_at_1"][str(rate)] = validate(model, processor)
            print(f"{name}, learning rate {rate:g}: {record['recall_at_1'][str(rate)]:.3f}", flush=True)
            records.write(records.tuning_file(name), record)
    return float(max(record["recall_at_1"], key=record["recall_at_1"].get))


def run(name: str, seed: int, folder: Path = base.FOLDER) -> None:
    """Trains and measures an arm with a seed, and writes the result. A result that there is stays."""
    file = records.result_file(name, seed)
    own = records.digest(folder / "model.safetensors")
    if records.read(file).get("base") == own:
        return
    arm, prompt = ARMS[name], best_prompt(folder)
    rate = tune(name, folder) if arm.is_trained else None
    start = time.perf_counter()
    model, processor, losses = train(arm, seed, rate or 0.0, prompt, folder)
    trained = time.perf_counter()
    metrics = measure(model, processor)
    if losses:
        metrics |= {f"final_{loss}": value for loss, value in losses[-1].items() if loss != "step"}
    record = {
        "arm": name,
        "seed": seed,
        "base": own,
        "settings": {**vars(arm), "prompt": prompt, "learning_rate": rate, "steps": STEPS, "batch_size": BATCH_SIZE},
        "metrics": {metric: round(value, 5) for metric, value in metrics.items()},
        "losses": losses,
        "minutes": {
            "training": round((trained - start) / 60, 2),
            "measuring": round((time.perf_counter() - trained) / 60, 2),
        },
    }
    records.write(file, record)
    shown = {
        metric: value for metric, value in record["metrics"].items() if "recall_at_1" in metric and "10" not in metric
    }
    print(f"{name}, seed {seed}: {shown}, perplexity {metrics['perplexity']:.2f}, {record['minutes']}", flush=True)
