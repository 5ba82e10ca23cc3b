"""The benchmarks: a declaration each, in a YAML file of this folder."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Benchmark:
    """
    A benchmark.

    Attributes:
        name: Name of its file.
        title: What papers call it.
        protocol: Name of the function that measures it
            ([`~hf_unigd.evaluation.protocols.PROTOCOLS`]).
        data: Where its rows are: the `reader` that reads them
            ([`~hf_unigd.evaluation.benchmark_data.READERS`]) and its arguments.
        columns: Columns of the rows, by the names that the protocol gives them.
        settings: Arguments of the protocol.
        knowledge: Other rows, which a model may retrieve: their `data` and `columns`.
        source: Where the data come from.
        fetch: What the user has to fetch, and into which files of the benchmark folder; empty for what is fetched by
            itself.
        licence: Licence of the data, as the source states it.
        citation: Who made it.
        notes: In what it differs from what a paper reports.
    """

    name: str
    title: str
    protocol: str
    data: Mapping[str, Any]
    source: str
    licence: str
    citation: str
    columns: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    knowledge: Mapping[str, Any] = field(default_factory=dict)
    fetch: str = ""
    notes: str = ""


@cache
def load_benchmarks() -> dict[str, Benchmark]:
    """All benchmarks by name."""
    files = sorted(Path(__file__).parent.glob("*.yaml"))
    return {file.stem: _read(file) for file in files}


def _read(file: Path) -> Benchmark:
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    known = {each.name for each in fields(Benchmark)} - {"name"}
    if unknown := content.keys() - known:
        raise ValueError(f"{file}: unknown keys {', '.join(sorted(unknown))}. Known are {', '.join(sorted(known))}.")
    return Benchmark(name=file.stem, **content)
