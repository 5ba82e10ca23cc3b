"""Runs benchmarks."""

import logging
from collections.abc import Sequence
from pathlib import Path

from .benchmark_data import read_benchmark
from .benchmarks import Benchmark, load_benchmarks
from .embedders import Embedder
from .protocols import PROTOCOLS
from .results import Result, ResultsFile
from .scores import Scores
from .tables import load_groups


logger = logging.getLogger(__name__)


def choose_benchmarks(names: Sequence[str]) -> list[Benchmark]:
    """
    The benchmarks of names, and of the groups among them, each once.

    Raises:
        ValueError: a name is neither a benchmark's nor a group's.
    """
    benchmarks, groups = load_benchmarks(), {name: group.benchmarks for name, group in load_groups().items()}
    groups["scenes"] = [name for name in benchmarks if name.startswith("scenes_")]
    chosen: dict[str, Benchmark] = {}
    for name in names:
        if name not in benchmarks and name not in groups:
            raise ValueError(
                f"There is no benchmark {name!r}. The benchmarks are {', '.join(benchmarks)}, and the groups "
                f"{', '.join(groups)}."
            )
        chosen |= {each: benchmarks[each] for each in groups.get(name, [name])}
    return list(chosen.values())


def run_benchmark(
    embedder: Embedder, benchmark: Benchmark, folder: str | Path | None, file: ResultsFile, show_progress: bool = True
) -> Result:
    """
    Measures a model on a benchmark, or finds in a file what it measured before.

    Args:
        embedder: The model.
        benchmark: The benchmark.
        folder: Where the files are that the user has fetched.
        file: Keeps the results.
        show_progress: Whether to draw progress bars.

    Raises:
        ValueError: the rows cannot be read, or the model does not do what the benchmark asks.
    """
    data = read_benchmark(benchmark, folder)
    description = {**data.description, "rows": len(data.rows)}
    if benchmark.settings:
        description["settings"] = dict(benchmark.settings)
    found = file.find(benchmark.name, description)
    if found is not None:
        logger.warning("%s was measured before. `--overwrite true` starts anew.", benchmark.title)
        return found
    scores, counts = PROTOCOLS[benchmark.protocol](embedder, data, show_progress, **benchmark.settings)
    metrics = {name: each.metric if isinstance(each, Scores) else each for name, each in scores.items()}
    single = {name: each for name, each in scores.items() if isinstance(each, Scores)}
    result = Result(benchmark.name, description, metrics, {**data.counts, **counts}, single)
    file.add(result)
    return result
