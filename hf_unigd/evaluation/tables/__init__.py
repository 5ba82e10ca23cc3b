"""The papers' tables, in their own rows and columns, each in a YAML file of this folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from ..results import Result


@dataclass(frozen=True)
class Table:
    """
    A table of a paper.

    Attributes:
        title: Its number and title.
        columns: For each column, the benchmark and the metrics that it is the mean of.
        rows: What the paper reports, in percent, by method; None where it reports nothing.
    """

    title: str
    columns: Mapping[str, Sequence[str]]
    rows: Mapping[str, Sequence[float | None]]

    def row_of(self, results: Sequence[Result]) -> list[float | None]:
        """The row of a model, in percent; None where it was not measured."""
        metrics = {result.benchmark: result.metrics for result in results}
        row: list[float | None] = []
        for benchmark, *names in self.columns.values():
            found = [metrics.get(benchmark, {}).get(name) for name in names]
            values = [value for value in found if value is not None]
            row.append(100 * sum(values) / len(values) if len(values) == len(names) else None)
        return row


@dataclass(frozen=True)
class Group:
    """
    Benchmarks that are run together.

    Attributes:
        title: Name of the paper.
        paper: Its reference.
        tables: Its tables.
    """

    title: str
    paper: str
    tables: Sequence[Table]

    @property
    def benchmarks(self) -> list[str]:
        """Names of the benchmarks of the tables, in their order."""
        return list(dict.fromkeys(column[0] for table in self.tables for column in table.columns.values()))


@cache
def load_groups() -> dict[str, Group]:
    """All groups by name."""
    groups = {}
    for file in sorted(Path(__file__).parent.glob("*.yaml")):
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        groups[file.stem] = Group(**{**content, "tables": [Table(**each) for each in content["tables"]]})
    return groups


def render_table(table: Table, models: Mapping[str, Sequence[Result]]) -> str:
    """
    A table as Markdown: what the paper reports, marked as such, and the rows of models below.

    Args:
        table: The table.
        models: The results of each model, by the name of its row.
    """
    lines = [["", *table.columns]]
    lines += [[f"{method} (paper)", *map(_percent, row)] for method, row in table.rows.items()]
    lines += [[f"**{name}** (measured)", *map(_percent, table.row_of(results))] for name, results in models.items()]
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    header, *rows = (
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )
    return "\n".join([header, "|" + "|".join("-" * (width + 2) for width in widths) + "|", *rows])


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
