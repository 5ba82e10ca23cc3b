"""`hf-unigd index`: embeds a dataset into a folder that can be searched and asked."""

from dataclasses import dataclass, field

from trl import TrlParser

from ..hub import load_checkpoint
from ..retrieval import build_index
from ..trainer import UniGDScriptArguments
from .inference import InferenceArguments


@dataclass
class IndexArguments(InferenceArguments):
    output: str = field(default="index", metadata={"help": "Folder to write, or to go on with."})
    faiss: str | None = field(
        default=None,
        metadata={"help": "Search by this FAISS index (Flat, HNSW32, 'IVF1024,Flat', ...) instead of exactly."},
    )
    truncate_dim: int | None = field(default=None, metadata={"help": "Matryoshka prefix of the embeddings to keep."})
    store_images: bool = field(default=True, metadata={"help": "Keep pictures, to be shown and put into prompts."})
    skip_bad_rows: bool = field(default=False, metadata={"help": "Skip bad rows, counted in the log."})
    rows_per_part: int = field(default=1000, metadata={"help": "Rows that an interruption can cost."})
    overwrite: bool = field(default=False, metadata={"help": "Throw away the index that the folder has."})


def main(argv: list[str]) -> None:
    parser = TrlParser((IndexArguments, UniGDScriptArguments), prog="hf-unigd index")
    args, script_args = parser.parse_args_and_config(argv)
    model, processor = load_checkpoint(args.model, **args.model_kwargs())
    index = build_index(
        model.to(args.device()),
        processor,
        script_args.load_rows(script_args.dataset_test_split),
        args.output,
        model_name=args.model,
        faiss=args.faiss,
        truncate_dim=args.truncate_dim,
        store_images=args.store_images,
        image_folder=args.image_folder,
        skip_bad_rows=args.skip_bad_rows,
        batch_size=args.batch_size,
        rows_per_part=args.rows_per_part,
        overwrite=args.overwrite,
    )
    print(f"{len(index)} embeddings of width {index.width} in {args.output}")
