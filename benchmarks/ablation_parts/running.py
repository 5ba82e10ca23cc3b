"""Runs an arm of any recipe: chooses its learning rate, trains it, measures it, and writes the result."""

import time
from pathlib import Path
from typing import Any

from . import base, clip, records, sentence, sugar, targets, vladva
from .arms import ARMS, Arm, ClipArm, SentenceArm, SugarArm, TargetArm


LEARNING_RATES = (1e-3, 3e-3, 1e-2)
OUTER_LEARNING_RATES = (1e-5, 3e-5, 1e-4, 3e-4, *LEARNING_RATES, 3e-2, 1e-1, 3e-1, 1.0)
TUNING_SEED = 100  # not one of those that are reported
# Each has `settings`, `train`, `validate` and `measure`.
RECIPES: dict[type, Any] = {
    Arm: vladva,
    SugarArm: sugar,
    TargetArm: targets,
    ClipArm: clip,
    SentenceArm: sentence,
}


def tune(name: str, folder: Path = base.FOLDER) -> float:
    """The learning rate of an arm that is best on validation rows. As long as the best is the lowest or the highest,
    the next one is tried too. Those that were tried are kept, and not tried again."""
    arm, own = ARMS[name], records.digest(folder / "model.safetensors")
    recipe = RECIPES[type(arm)]
    record = records.read(records.tuning_file(name))
    if record.get("base") != own:
        record = {"arm": name, "seed": TUNING_SEED, "base": own, "validation": {}}
    while rate := next_learning_rate({float(rate): value for rate, value in record["validation"].items()}):
        embedder, _ = recipe.train(arm, TUNING_SEED, rate, folder)
        record["validation"][str(rate)] = recipe.validate(embedder)
        print(f"{name}, learning rate {rate:g}: {record['validation'][str(rate)]:.3f}", flush=True)
        records.write(records.tuning_file(name), record)
    return float(max(record["validation"], key=record["validation"].get))


def next_learning_rate(tried: dict[float, float]) -> float | None:
    """What to try after learning rates with their recalls: all of `LEARNING_RATES`, and then the neighbours of the
    best, until both were tried."""
    missing = [rate for rate in LEARNING_RATES if rate not in tried]
    if not missing:
        best = OUTER_LEARNING_RATES.index(max(tried, key=tried.__getitem__))
        around = OUTER_LEARNING_RATES[max(best - 1, 0) : best + 2]
        missing = [rate for rate in around if rate not in tried]
    return missing[0] if missing else None


def run(name: str, seed: int, folder: Path = base.FOLDER) -> None:
    """Trains and measures an arm with a seed, and writes the result. A result that there is stays, if its learning
    rate is still the best."""
    file = records.result_file(name, seed)
    own = records.digest(folder / "model.safetensors")
    arm = ARMS[name]
    recipe = RECIPES[type(arm)]
    rate = tune(name, folder) if arm.is_trained else None
    there = records.read(file)
    if there.get("base") == own and there["settings"]["learning_rate"] == rate:
        return
    settings = recipe.settings(arm, folder)
    start = time.perf_counter()
    embedder, losses = recipe.train(arm, seed, rate, folder)
    trained = time.perf_counter()
    metrics = recipe.measure(embedder)
    metrics |= {f"final_{loss}": value for loss, value in (losses[-1].items() if losses else ()) if loss != "step"}
    record = {
        "arm": name,
        "seed": seed,
        "base": own,
        "settings": {**vars(arm), **settings, "learning_rate": rate},
        "metrics": {metric: round(value, 5) for metric, value in metrics.items()},
        "losses": losses,
        "minutes": {
            "training": round((trained - start) / 60, 2),
            "measuring": round((time.perf_counter() - trained) / 60, 2),
        },
    }
    records.write(file, record)
    shown = ", ".join(f"{metric} {value:.3f}" for metric, value in metrics.items() if metric in SHOWN)
    print(f"{name}, seed {seed}: {shown}; minutes {record['minutes']}", flush=True)


SHOWN = ("text_to_image_recall_at_1", "image_to_text_recall_at_1", "5c+4i_recall_at_5", "perplexity", "pope_accuracy")
