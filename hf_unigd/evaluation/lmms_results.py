"""Reads what lmms-eval wrote about a model, for a comparison."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from ..inputs import reading
from .results import Result
from .scores import Scores


PREFIX = "lmms-eval/"
_RESULTS = "_results.json"
# What a task's settings say of the questions: models that were asked others cannot be compared.
_SETTINGS = ("num_fewshot", "generation_kwargs", "lmms_eval_specific_kwargs")


@dataclass(frozen=True)
class LmmsResult(Result):
    """
    What lmms-eval says of a model on one of its tasks.

    Attributes:
        better: By metric, `"higher"` or `"lower"`, which is better; without those of which lmms-eval does not say it.
        source: The model that lmms-eval ran, and the name of the file.
    """

    better: Mapping[str, str] | None = None
    source: str = ""


def read_lmms_results(path: str | Path) -> list[LmmsResult]:
    """
    Reads the metrics of lmms-eval's tasks, and with `--log_samples` the scores of single questions. Where these are
    numbers whose mean is the metric, the result has them; other metrics, such as CIDEr and F1, are values alone.

    Args:
        path: A results file (`*_results.json`), beside which the files of its samples are; or a folder, in which the
            newest results of each task count.

    Raises:
        ValueError: there are no results, those of several models, or a file is damaged.
    """
    path = Path(path)
    files = sorted(path.rglob(f"*{_RESULTS}")) if path.is_dir() else [path]
    if not files or not path.exists():
        raise ValueError(f"{path} is neither a results file of lmms-eval (`*{_RESULTS}`) nor a folder with one.")
    found: dict[str, LmmsResult] = {}
    models: dict[str, Path] = {}
    for file in sorted(files, key=lambda each: each.name):  # which begins with the date
        with reading(file):
            content = json.loads(file.read_text(encoding="utf-8"))
            if not (isinstance(content, dict) and isinstance(content.get("results"), dict) and "n-samples" in content):
                raise ValueError("this is no results file of lmms-eval")
            models.setdefault(content.get("model_name") or "", file)
            found |= {task: _read(file, content, task) for task in content["results"]}
    if len(models) > 1:
        raise ValueError(
            f"{path} holds lmms-eval's results of several models: {', '.join(sorted(models))}. Name the folder or the "
            "file of one."
        )
    found = {task: each for task, each in found.items() if each.metrics}
    if not found:
        raise ValueError(f"{path}: lmms-eval has no metric there, only answers.")
    return list(found.values())


def _read(file: Path, content: Mapping[str, Any], task: str) -> LmmsResult:
    settings = content.get("configs", {}).get(task, {})
    directions = content.get("higher_is_better", {}).get(task) or {}
    numbers = content["n-samples"].get(task) or {}
    metrics, better = {}, {}
    for key, value in content["results"][task].items():
        name, _, filtered = key.partition(",")
        if filtered and "_stderr" not in name and isinstance(value, Real) and not isinstance(value, bool):
            metric = name if filtered == "none" else f"{name} ({filtered})"
            metrics[metric] = float(value)
            if directions.get(name) is not None:
                better[metric] = "higher" if directions[name] else "lower"
    counts = {"questions": numbers["effective"]} if numbers else {}
    if numbers and numbers["original"] != numbers["effective"]:
        counts["left_out"] = numbers["original"] - numbers["effective"]
    dataset = {
        "path": settings.get("dataset_path"),
        "config": settings.get("dataset_name"),
        "split": settings.get("test_split"),
        "revision": (settings.get("dataset_kwargs") or {}).get("revision"),
        "task_version": content.get("versions", {}).get(task),
        "questions": numbers.get("effective"),
        "settings": {name: settings[name] for name in _SETTINGS if settings.get(name) is not None},
    }
    samples = file.with_name(f"{file.name.removesuffix(_RESULTS)}_samples_{task}.jsonl")
    scores = _read_samples(samples, metrics) if samples.is_file() else {}
    source = f"{content.get('model_name') or 'a model'}, {file.name}"
    return LmmsResult(f"{PREFIX}{task}", dataset, metrics, counts, scores, better, source)


def _read_samples(file: Path, metrics: Mapping[str, float]) -> dict[str, Scores]:
    """The scores of single questions, in the order of their numbers, of the metrics that are their means."""
    with reading(file):
        samples = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        samples.sort(key=lambda sample: sample["doc_id"])
    places = np.array([sample["doc_id"] for sample in samples], dtype=np.int64)
    if len(samples) == 0 or len(set(places)) < len(places):  # several filters, of which a line does not say its own
        return {}
    scores = {}
    for metric, value in metrics.items():
        single = np.array([_score(sample.get(metric)) for sample in samples], dtype=np.float64)
        if math.isclose(single.mean(), value, rel_tol=1e-6, abs_tol=1e-9):  # not so if one is no number
            scores[metric] = Scores(single, groups=places)
    return scores


def _score(value: Any) -> float:
    """A number, or the `score` that a task has beside the answer; NaN where there is none."""
    if isinstance(value, Mapping):
        value = value.get("score")
    return float(value) if isinstance(value, Real) else math.nan
