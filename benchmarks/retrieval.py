"""Measures an index: `python benchmarks/retrieval.py [exact] [approximate] [building]`.

`exact`: one query and 64 at once, in a process that has searched before, beside the product of the same vectors with
torch in memory and its best ten. Both take turns. `opening` is the time to load the index, and `first search` includes
reading the vectors.
`approximate`: recall of the ten nearest and time of a query, beside exact search, by type of index and by rounding.
The vectors have structure: points around 2,000 centres, and queries near them.
`building`: rows a second without the model, which is replaced by random vectors, from rows of text to entries.

The script writes benchmarks/results/retrieval_*.json after each case.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import torch
from datasets import Features

from hf_unigd.retrieval import EmbeddingIndex
from hf_unigd.retrieval.description import IndexDescription
from hf_unigd.retrieval.entries import entry_schema
from hf_unigd.retrieval.table import EntryTable


RESULTS = Path(__file__).parent / "results"
SIZES = ((10_000, 1024), (100_000, 1024), (100_000, 4096), (1_000_000, 1024))
K, CENTRES, ROWS_PER_INSERT = 10, 2000, 20_000
ANN = ("IVF_RQ", "IVF_FLAT", "IVF_SQ")


def clustered(count: int, width: int, seed: int, noise: float) -> np.ndarray:
    """Unit vectors around `CENTRES` points."""
    centres = np.random.default_rng(0).standard_normal((CENTRES, width), dtype=np.float32)
    generator = np.random.default_rng(seed)
    vectors = noise * generator.standard_normal((count, width), dtype=np.float32)
    vectors += centres[generator.integers(0, CENTRES, count)]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def make_index(folder: Path, count: int, width: int) -> float:
    """Writes an index, and returns the seconds that it took without making the vectors."""
    description = IndexDescription("model", None, "float32", [1.0], None, True, None)
    schema = entry_schema(width, Features({})).with_metadata(description.to_metadata())
    table, seconds = EntryTable.create(folder, schema), 0.0
    for start in range(0, count, ROWS_PER_INSERT):
        vectors = clustered(min(ROWS_PER_INSERT, count - start), width, start + 1, 0.8)
        begun = time.perf_counter()
        numbers = range(start, start + len(vectors))
        parts = pa.array([[{"text": f"entry {number}", "image": None}] for number in numbers], schema.field(2).type)
        columns = {
            "id": [f"rows/{number}" for number in numbers],
            "row": list(numbers),
            "sequence": parts,
            "answer": pa.array([[]] * len(vectors), schema.field(3).type),
            "text": [f"entry {number}" for number in numbers],
            "modality": ["text"] * len(vectors),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), width),
        }
        table.insert(pa.table(columns, schema=schema))
        seconds += time.perf_counter() - begun
    return seconds


def timed(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(index: EmbeddingIndex, queries: torch.Tensor, repeats: int) -> dict:
    """Times of the index and of the product in memory, in turns."""
    matrix = torch.from_numpy(index._vectors._rows)
    times: dict[str, list[float]] = {"index": [], "product": []}
    for _ in range(repeats):
        times["index"].append(timed(lambda: index.nearest(queries, K)))
        times["product"].append(timed(lambda: (queries @ matrix.T).topk(K)))
    ratios = [a / b for a, b in zip(times["index"], times["product"], strict=True)]
    return {
        **{f"{name}_p50_ms": 1000 * statistics.median(each) for name, each in times.items()},
        **{f"{name}_p95_ms": 1000 * float(np.quantile(each, 0.95)) for name, each in times.items()},
        "ratio": statistics.median(ratios),
    }


def measure_exact(uri: Path, width: int, repeats: int) -> dict:
    opening = statistics.median(timed(lambda: EmbeddingIndex.load(uri)) for _ in range(3))
    index = EmbeddingIndex.load(uri, memory_share=0.9)
    before = psutil.Process().memory_info().rss
    first = timed(lambda: index.nearest(torch.from_numpy(clustered(1, width, 7, 1.0)), K))
    memory = (psutil.Process().memory_info().rss - before) / 1e6
    by_queries = {
        f"{queries} queries": compare(index, torch.from_numpy(clustered(queries, width, 11, 1.0)), repeats)
        for queries in (1, 64)
    }
    return {"opening_s": opening, "first_search_s": first, "memory_mb": memory, **by_queries}


def exact(arguments, save) -> None:
    found = {}
    for count, width in SIZES[: arguments.sizes]:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            make_index(Path(folder, "index"), count, width)
            found[f"{count} x {width}"] = measure_exact(Path(folder, "index"), width, arguments.repeats)
            print(f"{count:,} x {width}: {json.dumps(found[f'{count} x {width}'])}", flush=True)
            save(found)


def approximate(arguments, save) -> None:
    count, width = SIZES[min(arguments.sizes, len(SIZES)) - 1]
    found = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        uri = Path(folder, "index")
        make_index(uri, count, width)
        queries = torch.from_numpy(clustered(50, width, 13, 0.8))

        exact = EmbeddingIndex.load(uri, memory_share=0.9)
        expected = [ids(exact, query) for query in queries]

        def measure(index: EmbeddingIndex) -> dict:
            """Takes turns with exact search, as other jobs may share the machine."""
            hits, times = [], {"exact": [], "index": []}
            ids(index, queries[0])
            for query in queries:
                times["exact"].append(timed(lambda query=query: ids(exact, query)))
                times["index"].append(timed(lambda query=query: hits.append(ids(index, query))))
            return {
                "recall_at_10": statistics.mean(len(a & b) / K for a, b in zip(hits, expected, strict=True)),
                "p50_ms": 1000 * statistics.median(times["index"]),
                "exact_p50_ms": 1000 * statistics.median(times["exact"]),
                "share_of_exact": statistics.median(
                    a / b for a, b in zip(times["index"], times["exact"], strict=True)
                ),
            }

        cases = [("precision", name) for name in ("float16", "int8", "binary")] + [("ann", name) for name in ANN]
        for kind, name in cases:
            table, seconds = EntryTable.open(uri), 0.0
            if kind == "ann":
                seconds = timed(lambda table=table, name=name: table.index_embeddings(name))
            index = EmbeddingIndex(table, name if kind == "precision" else "float32", memory_share=0.9)
            found[name] = {**measure(index), "making_s": seconds}
            print(f"{count:,} x {width}, {name}: {json.dumps(found[name])}", flush=True)
            del index
            save({f"{count} x {width}": found})


def ids(index: EmbeddingIndex, query: torch.Tensor) -> set[str]:
    return {hit.id for hit in index.nearest(query[None], K)[0]}


def building(arguments, save) -> None:
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rates = {}
        for count in (20_000, 200_000):
            rates[str(count)] = count / make_index(Path(folder, str(count)), count, 1024)
            print(f"building, {count:,} x 1024: {rates[str(count)]:.0f} rows/s", flush=True)
        schema_rows = EntryTable.open(Path(folder, "20000"))
        times, sizes = [], []
        row = next(schema_rows.batches(schema_rows.schema.names, "row = 1")).select(schema_rows.schema.names)
        for number in range(1000):  # small additions, joined as `build_index` joins them
            entry = pa.Table.from_batches([row]).set_column(0, schema_rows.schema.field(0), [[f"small/{number}"]])
            times.append(timed(lambda entry=entry: schema_rows.insert(entry)))
            schema_rows.keep_up()
            if number % 250 == 249:
                files = [file for file in Path(folder, "20000").rglob("*") if file.is_file()]
                sizes.append(sum(file.stat().st_size for file in files) / 1e6)
        schema_rows.optimize(keep=timedelta(0))
        sizes.append(sum(file.stat().st_size for file in Path(folder, "20000").rglob("*") if file.is_file()) / 1e6)
        small = {
            "first_100_ms": 1000 * statistics.median(times[:100]),
            "last_100_ms": 1000 * statistics.median(times[-100:]),
            "megabytes_by_250": sizes[:-1],
            "megabytes_without_old_versions": sizes[-1],
        }
        print(f"1,000 small additions: {json.dumps(small)}", flush=True)
        save({"rows_per_second": rates, "small_additions": small})


BENCHMARKS = {"exact": exact, "approximate": approximate, "building": building}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(BENCHMARKS), help=", ".join(BENCHMARKS))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--sizes", type=int, default=len(SIZES), help=f"How many of {SIZES} to measure.")
    parser.add_argument("--folder", type=Path, default=None, help="Folder for the indexes, which are removed again.")
    arguments = parser.parse_args()
    for name in arguments.names:
        result = {
            "command": f"python benchmarks/retrieval.py {name} --repeats {arguments.repeats} "
            f"--sizes {arguments.sizes}",
            "cores": os.cpu_count(),
            "load_average": os.getloadavg()[0],
            "python": platform.python_version(),
            **{each: version(each) for each in ("torch", "lancedb", "numpy")},
        }

        def save(results: dict, file=RESULTS / f"retrieval_{name}.json", result=result) -> None:
            file.write_text(json.dumps({**result, "results": results}, indent=1) + "\n")

        BENCHMARKS[name](arguments, save)


if __name__ == "__main__":
    main()
