"""The page of a comparison: Markdown with a `model-index`, a picture, and JSON."""

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index
from yaml import safe_dump

from ..outputs import writing
from .benchmarks import load_benchmarks
from .comparison import RESAMPLES, Change, compare_results, format_value, section_of, summary
from .figures import draw_changes
from .lmms_results import LmmsResult
from .results import Result, is_results


_TASK_TYPES = {"Generation": "image-text-to-text"}  # of the Hub
PAGE, PICTURE, DATA = "README.md", "comparison.png", "comparison.json"


def check_own_folder(folder: str | Path) -> None:
    """
    Raises:
        ValueError: a folder holds files, and neither results of models nor a comparison among them.
    """
    folder = Path(folder)
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    known = [file for file in files if file.suffix == ".json" and file.is_file()]
    if files and not any(is_results(file) or _is_comparison(file) for file in known):
        raise ValueError(
            f"{folder} holds files that no such command wrote: {', '.join(file.name for file in files[:5])}. Choose a "
            "new folder as `--output`."
        )


def _is_comparison(file: Path) -> bool:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(content, dict) and content.keys() == {"base", "models", "changes"}


def write_report(models: Mapping[str, Sequence[Result]], folder: str | Path) -> str:
    """
    Writes the comparison of a base model and of others with it.

    Args:
        models: The results of each model on the same benchmarks, by its name; the first is the base.
        folder: Folder to write `README.md`, `comparison.png` and `comparison.json` to.

    Returns:
        The page, in Markdown.

    Raises:
        ValueError: there are fewer than two models, or they were not measured on the same.
    """
    names = list(models)
    if len(names) < 2:
        raise ValueError("A comparison needs a base model and at least one other.")
    base, tuned = names[0], names[1:]
    changes = {name: compare_results(models[base], models[name]) for name in tuned}
    page = _page(base, changes, models)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    draw_changes(changes, folder / PICTURE, title=f"Change from {base}")
    with writing(folder / DATA) as file:
        file.write_text(json.dumps(_as_json(base, changes, models), indent=2) + "\n", encoding="utf-8")
    with writing(folder / PAGE) as file:
        file.write_text(page, encoding="utf-8")
    return page


def _page(base: str, changes: Mapping[str, Sequence[Change]], models: Mapping[str, Sequence[Result]]) -> str:
    index = [entry for name in changes for entry in eval_results_to_model_index(name, _eval_results(models[name]))]
    front = safe_dump({"model-index": index}, sort_keys=False, allow_unicode=True)
    parts = [f"---\n{front}---\n\n# What tuning changed\n\nBase: `{base}`."]
    for name, each in changes.items():
        counts = summary(each)
        parts.append(
            f"## `{name}`\n\nOf {len(each)} metrics, {counts['gained']} gained, {counts['lost']} lost, and "
            f"{counts['undecided']} are undecided."
        )
        for verdict in ("lost", "gained"):
            named = [f"{change.benchmark} {change.metric}" for change in each if change.verdict == verdict]
            if named:
                parts.append(f"**{verdict.capitalize()}**: {', '.join(named)}.")
        for section, own in groupby(each, key=lambda change: change.section):
            parts.append(f"### {section}\n\n{_table(list(own))}")
    parts += _missing(models)
    parts.append(f"![Changes and their intervals]({PICTURE})")
    counts_lines = [
        f"- {result.benchmark}: "
        + ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in result.counts.items())
        for result in models[base]
    ]
    sources = {(name, result.source) for name in models for result in models[name] if isinstance(result, LmmsResult)}
    counts_lines += [f"- lmms-eval, `{name}`: {source}" for name, source in sorted(sources)]
    parts.append("### Items\n\n" + "\n".join(counts_lines))
    parts.append(
        "Metrics are in percent, except perplexity, of which less is better, and those of lmms-eval, which stand as "
        f"it writes them. Intervals are of 95 %, by a paired bootstrap of {RESAMPLES:,} draws over images, texts, "
        "stories or questions. A change is undecided if its interval holds zero, or if there is none (`-`), because "
        "the scores of single items are not known."
    )
    return "\n\n".join(parts) + "\n"


def _missing(models: Mapping[str, Sequence[Result]]) -> list[str]:
    """A line for each model that was not measured on what others were measured on."""
    every = {result.benchmark: isinstance(result, LmmsResult) for results in models.values() for result in results}
    lines = []
    for name, results in models.items():
        own = {result.benchmark for result in results}
        for is_given, why in ((False, "which ask for what it does not do"), (True, "of which no results were given")):
            if missing := [each for each, of_lmms in every.items() if of_lmms == is_given and each not in own]:
                lines.append(f"`{name}` was not measured on {', '.join(missing)}, {why}.")
    return lines


def _table(changes: Sequence[Change]) -> str:
    lines = ["| Benchmark | Metric | Base | Tuned | Change | 95 % interval | |", "|---|---|---|---|---|---|---|"]
    for change in changes:
        interval = "-"
        if change.low is not None and change.high is not None:
            low, high = (format_value(change, each, sign=True) for each in (change.low, change.high))
            interval = f"{low} to {high}"
        values = [format_value(change, each) for each in (change.base, change.tuned)]
        difference = format_value(change, change.difference, sign=True)
        cells = [change.benchmark, change.metric, *values, difference, interval, change.verdict]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _eval_results(results: Sequence[Result]) -> list[EvalResult]:
    """The metrics of a model as its card's metadata have them, with the dataset and its revision."""
    found = []
    for result in results:
        declared = load_benchmarks().get(result.benchmark)
        path = result.dataset.get("path")
        for metric, value in result.metrics.items():
            found.append(
                EvalResult(
                    task_type=_TASK_TYPES.get(section_of(result, metric), "feature-extraction"),
                    dataset_type=path or result.benchmark,
                    dataset_name=declared.title if declared else result.benchmark,
                    dataset_config=result.dataset.get("config"),
                    dataset_split=result.dataset.get("split"),
                    dataset_revision=result.dataset.get("revision"),
                    metric_type=metric,
                    metric_value=round(value, 4),
                )
            )
    return found


def _as_json(
    base: str, changes: Mapping[str, Sequence[Change]], models: Mapping[str, Sequence[Result]]
) -> dict[str, Any]:
    return {
        "base": base,
        "models": {
            name: [
                {
                    "benchmark": result.benchmark,
                    "dataset": dict(result.dataset),
                    "metrics": dict(result.metrics),
                    "counts": dict(result.counts),
                }
                for result in results
            ]
            for name, results in models.items()
        },
        "changes": {
            name: [{**vars(change), "difference": change.difference, "verdict": change.verdict} for change in each]
            for name, each in changes.items()
        },
    }
