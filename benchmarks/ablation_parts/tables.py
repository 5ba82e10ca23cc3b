"""Tables in Markdown of what the files of results hold."""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from . import records
from .arms import ARMS, Column, Table
from .spread import Sample


SEEDS = (0, 1, 2)
NOT_RUN, NOT_MEASURED, NO_DIFFERENCE = "not run yet", "-", "no difference"

# Of an arm, by seed.
Results = dict[int, dict[str, Any]]


def seeds_of(arm: str) -> tuple[int, ...]:
    """An arm in which nothing is trained is the same with every seed."""
    return SEEDS if ARMS[arm].is_trained else SEEDS[:1]


def load_results(names: Sequence[str]) -> dict[str, Results]:
    """
    The results that there are, by arm and seed.

    Raises:
        ValueError: they started from different base models, so that they cannot be compared.
    """
    found: dict[str, Results] = {}
    bases: dict[str, str] = {}
    for name in names:
        stored = {seed: records.read(records.result_file(name, seed)) for seed in seeds_of(name)}
        found[name] = {seed: record for seed, record in stored.items() if record}
        bases |= {record["base"]: records.result_file(name, seed).name for seed, record in found[name].items()}
    if len(bases) > 1:
        raise ValueError(f"The results started from different base models: {bases}. Run the older ones again.")
    return found


def sample(results: Results, column: Column, is_random: bool = True) -> Sample | None:
    """The values of a column for an arm, in per cent if they are shares; None if no seed has them."""
    values = [
        fmean(record["metrics"][metric] for metric in column.metrics) * (100 if column.is_share else 1)
        for record in results.values()
        if all(metric in record["metrics"] for metric in column.metrics)
    ]
    return Sample(tuple(values), is_random) if values else None


def fill_table(table: Table) -> str:
    """A table: the means with their spreads, every seed, and the differences from the reference."""
    results = load_results(list(table.rows))
    if not any(results.values()):
        return NOT_RUN
    samples = {
        name: [sample(results[name], column, ARMS[name].is_trained) for column in table.columns] for name in table.rows
    }
    titles = {name: _title(title, len(results[name]), len(seeds_of(name))) for name, title in table.rows.items()}

    def markdown(cell: Callable[[Sample, Sample | None, Column], str], names: Sequence[str]) -> list[str]:
        lines = [
            "| | " + " | ".join(column.title for column in table.columns) + " |",
            "|---" * (len(table.columns) + 1) + "|",
        ]
        for name in names:
            missing = NOT_MEASURED if results[name] else NOT_RUN
            cells = [
                missing if own is None else cell(own, other, column)
                for own, other, column in zip(samples[name], samples[table.reference], table.columns, strict=True)
            ]
            lines.append(f"| {titles[name]} | " + " | ".join(cells) + " |")
        return lines

    others = [name for name in table.rows if name != table.reference]
    return "\n".join(
        [
            "Means over seeds, and in brackets the spread, the largest minus the smallest:\n",
            *markdown(_mean, list(table.rows)),
            "\nEvery seed:\n",
            *markdown(_every, list(table.rows)),
            f'\nDifferences from "{table.rows[table.reference]}", where they are larger than both spreads:\n',
            *markdown(_difference, others),
        ]
    )


def _title(title: str, done: int, wanted: int) -> str:
    return f"{title} ({done} of {wanted} seeds)" if 0 < done < wanted else title


def _places(column: Column) -> int:
    return 1 if column.is_share else 2


def _mean(own: Sample, other: Sample | None, column: Column) -> str:
    places = _places(column)
    spread = f" ({own.spread:.{places}f})" if own.is_random and own.spread is not None else ""
    return f"{own.mean:.{places}f}{spread}"


def _every(own: Sample, other: Sample | None, column: Column) -> str:
    return ", ".join(f"{value:.{_places(column)}f}" for value in own.values)


def _difference(own: Sample, other: Sample | None, column: Column) -> str:
    if other is None:
        return NOT_RUN
    difference = own.difference(other)
    if difference is None:
        return "one seed" if None in (own.spread, other.spread) else NO_DIFFERENCE
    return f"{difference:+.{_places(column)}f}"
