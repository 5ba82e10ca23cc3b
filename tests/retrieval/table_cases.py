"""Tables of entries without a model, and processes that write to them."""

import multiprocessing

import numpy as np
import pyarrow as pa
from datasets import Features

from hf_unigd.retrieval.entries import entry_schema
from hf_unigd.retrieval.table import EntryTable


WIDTH = 32
SCHEMA = entry_schema(WIDTH, Features({}))
spawned = multiprocessing.get_context("spawn")  # LanceDB does not survive a fork


def make_entries(numbers, text="a cat"):
    vectors = np.eye(WIDTH, dtype=np.float32)[np.array(numbers) % WIDTH]
    return pa.table(
        {
            "id": [f"rows/{number}" for number in numbers],
            "row": list(numbers),
            "sequence": [[{"text": text, "image": None}]] * len(numbers),
            "answer": [[]] * len(numbers),
            "text": [text] * len(numbers),
            "modality": ["text"] * len(numbers),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), WIDTH),
        },
        schema=SCHEMA,
    )


def ids_of(table):
    return [value for batch in table.batches(["id"]) for value in batch["id"].to_pylist()]


def insert(uri, numbers, size, started=None):
    table = EntryTable.open(uri)
    for start in range(0, len(numbers), size):
        table.insert(make_entries(numbers[start : start + size]))
        table.keep_up()
        if started is not None:
            started.set()
