"""
Adds a dataset to an index with Ray Data, whose actors hold the model and read from wherever Ray reads.

hf-unigd index --model you/model --dataset_name first_rows --id_column id --output s3://bucket/index
python examples/retrieval/index_with_ray.py s3://bucket/rows/*.parquet --index s3://bucket/index --actors 16 --gpus 1

The first command makes the index of a few rows. The second one can be started again: rows whose ids the index has are
not embedded.
"""

import argparse

import numpy as np
import ray

from hf_unigd import load_checkpoint
from hf_unigd.retrieval import EmbeddingIndex, RowAdder


class Indexer:
    """An actor, which adds batches of rows."""

    def __init__(self, index: str, id_column: str, device: str):
        made = EmbeddingIndex.load(index).description
        model, processor = load_checkpoint(made.model, revision=made.revision)
        self.adder = RowAdder(model.to(device), processor, index, id_column)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[int]]:
        columns = {name: values.tolist() for name, values in batch.items()}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return {"added": [self.adder.add(rows)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="Parquet files of rows in an accepted format, with a column of ids.")
    parser.add_argument("--index", required=True, help="Folder or address of the index.")
    parser.add_argument("--id_column", default="id", help="Column of the ids.")
    parser.add_argument("--actors", type=int, default=2, help="Number of actors, each of which holds the model.")
    parser.add_argument("--gpus", type=float, default=0, help="Number of GPUs of an actor.")
    parser.add_argument("--batch_size", type=int, default=1000, help="Number of rows that are added at once.")
    args = parser.parse_args()
    counts = ray.data.read_parquet(args.files).map_batches(
        Indexer,
        fn_constructor_args=(args.index, args.id_column, "cuda" if args.gpus else "cpu"),
        batch_size=args.batch_size,
        num_gpus=args.gpus,
        concurrency=args.actors,
    )
    print(f"{counts.sum('added')} rows are added")


if __name__ == "__main__":
    main()
