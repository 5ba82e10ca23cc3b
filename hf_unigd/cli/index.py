"""
Embed a dataset into an index that `hf-unigd search` and `hf-unigd answer` query. An interrupted run continues where it
stopped when it is started again.
"""

from dataclasses import dataclass, field

from ..hub import load_checkpoint
from ..outputs import OutputFolder
from ..retrieval import build_index
from ..settings import Positive
from ..trainer import UniGDScriptArguments
from .arguments import CheckpointArguments, accelerator
from .parser import CommandParser


@dataclass
class IndexArguments(CheckpointArguments):
    output: OutputFolder = field(default="index", metadata={"help": "Folder to write, or to continue in."})
    batch_size: Positive = field(default=32, metadata={"help": "Number of rows per forward pass."})
    faiss: str | None = field(
        default=None,
        metadata={
            "help": "FAISS index to search with: Flat, HNSW32, 'IVF1024,Flat', ... The search is exact without."
        },
    )
    truncate_dim: Positive | None = field(
        default=None, metadata={"help": "Matryoshka prefix of the embeddings to keep."}
    )
    store_images: bool = field(
        default=True, metadata={"help": "Keep the images, which plots and `hf-unigd answer --use_images` need."}
    )
    skip_bad_rows: bool = field(default=False, metadata={"help": "Skip bad rows and log their number."})
    rows_per_part: Positive = field(
        default=1000, metadata={"help": "Number of rows per file. An interrupted run loses at most these."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Delete the index that the folder holds."})


def main(argv: list[str]) -> None:
    parser = CommandParser("index", IndexArguments, UniGDScriptArguments, description=__doc__)
    args, script_args = parser.parse(argv)
    model, processor = load_checkpoint(args.model, dtype=args.dtype)
    index = build_index(
        model.to(accelerator()),
        processor,
        script_args.load_rows(script_args.dataset_test_split),
        args.output,
        model_name=args.model,
        faiss=args.faiss,
        truncate_dim=args.truncate_dim,
        store_images=args.store_images,
        **args.image_settings(),
        skip_bad_rows=args.skip_bad_rows,
        batch_size=args.batch_size,
        rows_per_part=args.rows_per_part,
        overwrite=args.overwrite,
    )
    print(f"{len(index)} embeddings of width {index.width} in {args.output}")
