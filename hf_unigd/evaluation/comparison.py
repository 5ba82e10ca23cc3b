"""Compares what models score on the same items: what is gained, what is lost, and how sure that is."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .benchmarks import load_benchmarks
from .lmms_results import LmmsResult
from .results import Result
from .scores import Scores


RESAMPLES = 2000
_TOGETHER = 100  # resamples whose counts are in memory at a time
_SECTIONS = {
    "retrieval": "Retrieval",
    "last_picture": "Retrieval",
    "caption_choice": "Compositionality",
    "two_positives": "Compositionality",
    "image_text_group": "Compositionality",
    "yes_no": "Generation",
    "picture_question": "Generation",
    "answer_positions": "Generation",
    "interleaved_answers": "Generation",
    "retrieval_answers": "Generation",
    "caption_generation": "Generation",
    "mteb": "MTEB",
}
_PERPLEXITY = "perplexity"


@dataclass(frozen=True)
class Change:
    """
    The change of a metric from one model to another.

    Attributes:
        section: The kind of what is measured: `"Retrieval"`, `"Compositionality"`, `"Generation"` or `"MTEB"`.
        benchmark: Name of the benchmark.
        metric: Name of the metric.
        base, tuned: Its values.
        low, high: Bounds of the 95 % interval of `tuned - base`; None where single items are not known.
        less_is_better: Whether less is better.
        in_percent: Whether the metric is shown in percent. If not, it is shown as it is.
    """

    section: str
    benchmark: str
    metric: str
    base: float
    tuned: float
    low: float | None
    high: float | None
    less_is_better: bool = False
    in_percent: bool = True

    @property
    def difference(self) -> float:
        """`tuned - base`."""
        return self.tuned - self.base

    @property
    def verdict(self) -> str:
        """`"gained"` or `"lost"` if the interval says so, otherwise `"undecided"`."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return "undecided"
        return "gained" if (self.low > 0) != self.less_is_better else "lost"


def compare_results(base: Sequence[Result], tuned: Sequence[Result], seed: int = 0) -> list[Change]:
    """
    The changes of all metrics from one model to another, in the order of the sections.

    Args:
        base, tuned: The results of both. What only one of them was measured on is left out.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: both have no benchmark in common, or were measured on other data or with other settings.
    """
    others = {each.benchmark: each for each in tuned}
    common = [(each, others[each.benchmark]) for each in base if each.benchmark in others]
    if not common:
        raise ValueError("Both models need results on the same benchmarks.")
    changes = []
    for before, after in common:
        _check_same(before, after)
        for metric in before.metrics:
            if metric not in after.metrics:  # perplexity, where one model does not generate
                continue
            low, high = None, None
            is_known, less_is_better, in_percent = _reading(before, metric)
            if is_known and metric in before.scores and metric in after.scores:
                try:
                    low, high = difference_interval(before.scores[metric], after.scores[metric], seed)
                except ValueError as error:
                    raise ValueError(f"{before.benchmark}, {metric}: {error}") from error
            changes.append(
                Change(
                    section_of(before, metric),
                    before.benchmark,
                    metric,
                    before.metrics[metric],
                    after.metrics[metric],
                    low,
                    high,
                    less_is_better,
                    in_percent,
                )
            )
    order = list(dict.fromkeys(_SECTIONS.values()))
    return sorted(changes, key=lambda change: order.index(change.section))


def section_of(result: Result, metric: str) -> str:
    """The kind of what a metric measures, as in [`Change.section`]."""
    if metric == _PERPLEXITY or isinstance(result, LmmsResult):
        return "Generation"
    declared = load_benchmarks().get(result.benchmark)
    return "Retrieval" if declared is None else _SECTIONS[declared.protocol]


def _reading(result: Result, metric: str) -> tuple[bool, bool, bool]:
    """Of a metric, whether it is known what is better, whether less is, and whether it is shown in percent."""
    if isinstance(result, LmmsResult):
        better = (result.better or {}).get(metric)
        return better is not None, better == "lower", False
    return True, metric == _PERPLEXITY, metric != _PERPLEXITY


def _check_same(before: Result, after: Result) -> None:
    names = sorted(before.dataset.keys() | after.dataset.keys())
    differing = [name for name in names if before.dataset.get(name) != after.dataset.get(name)]
    if differing:
        told = "; ".join(
            f"`{each}` {before.dataset.get(each)!r} and {after.dataset.get(each)!r}" for each in differing
        )
        raise ValueError(f"{before.benchmark}: the models were measured on other data or with other settings: {told}.")


def difference_interval(
    base: Scores, tuned: Scores, seed: int = 0, resamples: int = RESAMPLES, level: float = 0.95
) -> tuple[float, float]:
    """
    Interval of the difference of a metric between two models on the same items, by the paired percentile bootstrap
    (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13): groups of items are drawn with
    replacement, the same for both models.

    Args:
        base, tuned: The scores of both.
        seed: Seed of the draws.
        resamples: Number of draws.
        level: Probability of the interval.

    Returns:
        The lower and the upper bound of the metric of `tuned` minus that of `base`.

    Raises:
        ValueError: the models were not scored on the same items.
    """
    if len(base.values) != len(tuned.values):
        raise ValueError(f"the models were scored on {len(base.values)} and {len(tuned.values)} items.")
    before, after = (np.arange(len(each.values)) if each.groups is None else each.groups for each in (base, tuned))
    if not np.array_equal(before, after):
        raise ValueError("the models were scored on other items.")
    sums = [_group_sums(scores) for scores in (base, tuned)]
    count = len(sums[0][0])
    draw = np.random.default_rng(seed)
    differences: list[np.ndarray] = []
    for start in range(0, resamples, _TOGETHER):
        drawn = draw.multinomial(count, np.full(count, 1 / count), size=min(_TOGETHER, resamples - start))
        metrics = [_metric(drawn @ totals, drawn @ weights, base) for totals, weights in sums]
        differences.append(metrics[1] - metrics[0])
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(differences), [tail, 1 - tail])
    return float(low), float(high)


def _group_sums(scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the weighted scores, and of the weights, of each group."""
    weights = np.ones_like(scores.values) if scores.weights is None else scores.weights
    if scores.groups is None:
        return scores.values * weights, weights
    _, groups = np.unique(scores.groups, return_inverse=True)
    return np.bincount(groups, scores.values * weights), np.bincount(groups, weights)


def _metric(totals: np.ndarray, weights: np.ndarray, scores: Scores) -> np.ndarray:
    means = totals / weights
    return np.exp(np.minimum(means, 700.0)) if scores.is_perplexity else means


def format_value(change: Change, value: float, sign: bool = False) -> str:
    """A value of a metric, or a difference, as pages show it: in percent with one digit, or as it is, with digits that
    go with the size of the metric."""
    shown = 100 * value if change.in_percent else value
    size = max(abs(change.base), abs(change.tuned))
    digits = 1 if change.in_percent else 4 if size < 1 else max(0, 2 - int(math.log10(size)))
    return f"{shown:+.{digits}f}" if sign else f"{shown:.{digits}f}"


def summary(changes: Sequence[Change]) -> Mapping[str, int]:
    """The number of metrics by verdict."""
    verdicts = [change.verdict for change in changes]
    return {verdict: verdicts.count(verdict) for verdict in ("gained", "lost", "undecided")}
