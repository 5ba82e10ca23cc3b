"""Results of evaluations, and the file that keeps them."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..bulk import process_state
from ..bulk.probe import probes_differ
from ..inputs import reading
from ..outputs import writing
from .scores import Scores


@dataclass(frozen=True)
class Result:
    """
    What a model scores on a benchmark.

    Attributes:
        benchmark: Name of the benchmark, or of the dataset.
        dataset: What was read: `path`, `revision`, `split`, ..., as values that JSON can hold.
        metrics: The metrics, by name.
        counts: Numbers of queries, candidates, items and left-out rows, by name.
        scores: The scores of single items, by the names of the metrics that are their means.
    """

    benchmark: str
    dataset: Mapping[str, Any]
    metrics: Mapping[str, float]
    counts: Mapping[str, int]
    scores: Mapping[str, Scores] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "benchmark": self.benchmark,
            "dataset": dict(self.dataset),
            "metrics": dict(self.metrics),
            "counts": dict(self.counts),
            "scores": {name: scores.as_json() for name, scores in self.scores.items()},
        }

    @classmethod
    def of_json(cls, stored: Mapping[str, Any]) -> "Result":
        """The result that [`as_json`] made this of."""
        scores = {name: Scores.of_json(each) for name, each in stored["scores"].items()}
        return cls(stored["benchmark"], stored["dataset"], stored["metrics"], stored["counts"], scores)

    def __str__(self) -> str:
        width = max(map(len, self.metrics), default=0)
        counts = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in self.counts.items())
        lines = [f"  {name:<{width}}  {value:.4f}" for name, value in self.metrics.items()]
        return "\n".join([f"{self.benchmark}: {counts}", *lines])


class ResultsFile:
    """
    The results of one model, in a JSON file. A run that was interrupted finds in it what is done.

    Args:
        file: The file, which need not exist; None keeps the results in memory.
        model: Description of the model: [`~hf_unigd.evaluation.embedders.Embedder.description`].
        probe: The first numbers of a fixed embedding, by which a model that was trained since is recognised.
        overwrite: Throw away what the file holds.

    Raises:
        ValueError: the file holds the results of another model.
    """

    def __init__(self, file: str | Path | None, model: Mapping[str, Any], probe: list[float], overwrite: bool = False):
        self.file = None if file is None else Path(file)
        self.model, self.probe = dict(model), probe
        self.results: list[Result] = []
        if self.file is not None and self.file.exists() and not overwrite:
            self.results = self._read(self.file)

    def find(self, benchmark: str, dataset: Mapping[str, Any]) -> Result | None:
        """A result that is there: that of the same benchmark on the same data."""
        same = [each for each in self.results if each.benchmark == benchmark and each.dataset == dataset]
        return same[0] if same else None

    def add(self, result: Result) -> None:
        """Adds a result, in the place of one of the same benchmark. The first process writes the file."""
        self.results = [each for each in self.results if each.benchmark != result.benchmark] + [result]
        if self.file is not None and process_state().is_main_process:
            content = {
                "model": self.model,
                "probe": [round(value, 6) for value in self.probe],
                "results": [each.as_json() for each in self.results],
            }
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with writing(self.file) as unfinished:
                unfinished.write_text(_dump(content) + "\n", encoding="utf-8")

    def _read(self, file: Path) -> list[Result]:
        with reading(file):
            content = json.loads(file.read_text(encoding="utf-8"))
            results = [Result.of_json(each) for each in content["results"]]
        changed = [
            f"`{name}` was {content['model'].get(name)!r}, now {self.model.get(name)!r}"
            for name in sorted(content["model"].keys() | self.model.keys())
            if content["model"].get(name) != self.model.get(name)
        ]
        if not changed and probes_differ(content["probe"], self.probe, (self.model["dtype"],)):
            changed = ["the model embeds a fixed text elsewhere now: it has been trained since"]
        if changed:
            raise ValueError(
                f"{file} holds the results of another model: {'; '.join(changed)}. Name another `--output`, or start "
                "anew with `--overwrite true`."
            )
        return results


def _dump(content: Mapping[str, Any]) -> str:
    """JSON that one can read, with each list of numbers in one line."""
    lists: list[str] = []

    def hide(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: hide(each) for name, each in value.items()}
        if isinstance(value, list) and all(isinstance(each, (int, float)) for each in value):
            lists.append(json.dumps(value))
            return f"\0{len(lists) - 1}\0"
        return [hide(each) for each in value] if isinstance(value, list) else value

    text = json.dumps(hide(content), indent=2, ensure_ascii=False)
    for number, each in enumerate(lists):
        text = text.replace(f'"\\u0000{number}\\u0000"', each)
    return text


def is_results(file: Path) -> bool:
    """Whether a file is a [`ResultsFile`]."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(content, dict) and content.keys() == {"model", "probe", "results"}


def print_results(results: Iterable[Result]) -> None:
    """Prints the metrics and the counts of results."""
    print("\n\n".join(map(str, results)))
