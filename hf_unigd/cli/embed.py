"""
Embed a dataset with a checkpoint or an adapter into a Parquet file, one row for each row, in their order. On several
devices: `accelerate launch -m hf_unigd embed ...`. An interrupted run continues where it stopped when it is started
again; a stream is then read from its beginning, without opening what is embedded already.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from ..bulk import embed_dataset, process_state
from ..bulk.embedding import check_embeddable
from ..bulk.parts import description_of
from ..hub import load_checkpoint
from ..outputs import OutputFile
from ..settings import Positive
from ..trainer import UniGDScriptArguments
from .arguments import CheckpointArguments, PartArguments
from .parser import CommandParser


def holds_embeddings(file: Path) -> bool:
    """Whether a file is what this command writes."""
    return description_of(file) is not None


EmbeddingsFile = Annotated[str, OutputFile(".parquet", holds_embeddings)]


@dataclass
class EmbedArguments(CheckpointArguments, PartArguments):
    output: EmbeddingsFile = field(
        default="embeddings.parquet",
        metadata={"help": "Parquet file to write. Until it is finished, its parts are in a hidden folder beside it."},
    )
    columns: list[str] = field(
        default_factory=lambda: ["anchor"],
        metadata={
            "help": "What of a row is embedded, into the columns `anchor_embedding` and `positive_embedding`: anchor "
            "(the image of a captioned image, the question of a chat), positive (the caption or other match), or both."
        },
    )
    keep_columns: list[str] = field(
        default_factory=list,
        metadata={"help": "Columns to write beside the embeddings, such as an id. The number of the `row` always is."},
    )
    prompt_name: str = field(
        default="query",
        metadata={
            "help": "Name of the model's instruction of anchors, in rows without one of their own: query, as in "
            "training, document, or that of a task. Positives have that of a document."
        },
    )
    batch_size: Positive = field(default=32, metadata={"help": "Number of sequences per forward pass."})
    truncate_dim: Positive | None = field(
        default=None, metadata={"help": "Matryoshka prefix of the embeddings to keep."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Delete what the file holds, or what a run has begun."})

    def __post_init__(self):
        check_embeddable(self.columns)


def main(argv: list[str]) -> None:
    parser = CommandParser("embed", EmbedArguments, UniGDScriptArguments, description=__doc__)
    args, script_args = parser.parse(argv)
    state = process_state()
    model, processor = load_checkpoint(args.model, dtype=args.dtype)
    count = embed_dataset(
        model.to(state.device),
        processor,
        script_args.load_rows(script_args.dataset_test_split),
        args.output,
        model_name=args.model,
        columns=args.columns,
        keep_columns=args.keep_columns,
        prompt_name=args.prompt_name,
        truncate_dim=args.truncate_dim,
        **args.image_settings(),
        **args.part_settings(),
        batch_size=args.batch_size,
        overwrite=args.overwrite,
    )
    if state.is_main_process:
        width = args.truncate_dim or model.config.embedding_dim
        print(f"{count} rows of embeddings of width {width} in {args.output}")
