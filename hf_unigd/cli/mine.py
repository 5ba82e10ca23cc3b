"""
Write a dataset again with hard negatives from an index of what its rows are to find: for texts, texts that are close
to the row's anchor; for images, images. The output trains as it is. On several devices: `accelerate launch -m
hf_unigd mine ...`. An interrupted run continues where it stopped when it is started again.
"""

from dataclasses import dataclass, field
from typing import Annotated

from ..bulk import process_state
from ..hub import load_checkpoint
from ..outputs import OutputFolder
from ..retrieval import EmbeddingIndex, mine_negatives
from ..retrieval.negative_rules import STRATEGIES
from ..settings import AtLeast, NotNegative, Positive
from ..trainer import UniGDScriptArguments
from .arguments import ImageArguments, PartArguments, dtype_field
from .parser import CommandParser


Margin = Annotated[float, AtLeast(0)]
Similarity = Annotated[float, AtLeast(-1)]


@dataclass
class MineArguments(ImageArguments, PartArguments):
    index: str = field(metadata={"help": "Folder or address that `hf-unigd index` wrote to."})
    output: OutputFolder = field(default="mined", metadata={"help": "Folder to write, or to continue in."})
    model: str | None = field(
        default=None,
        metadata={"help": "Hub id or folder of the model that made the index, if it is no longer where it was."},
    )
    dtype: str = dtype_field("Data type to load the backbone in.")
    num_negatives: Positive = field(
        default=3, metadata={"help": "Number of negatives of a row. Rows for which there are fewer are left out."}
    )
    range_min: NotNegative = field(
        default=0,
        metadata={"help": "How many of the closest that pass the other rules to leave out, for fear that they match."},
    )
    range_max: Positive | None = field(
        default=None,
        metadata={
            "help": "How many of the closest entries to look at. By default `range_min` + `num_negatives`, or "
            "`range_min` + 10 * `num_negatives` with a margin, a `max_score`, or the strategy random."
        },
    )
    max_score: Similarity | None = field(
        default=None, metadata={"help": "Highest cosine similarity of a negative to the anchor."}
    )
    min_score: Similarity | None = field(
        default=None, metadata={"help": "Lowest cosine similarity of a negative to the anchor."}
    )
    absolute_margin: Margin | None = field(
        default=None, metadata={"help": "How much less similar to the anchor than the positive a negative must be."}
    )
    relative_margin: Margin | None = field(
        default=None,
        metadata={
            "help": "The same as a share of the positive's similarity: 0.05 for at most 0.95 of it (NV-Retriever)."
        },
    )
    sampling_strategy: str = field(
        default="top",
        metadata={
            "help": "Whether to take the closest of the entries that are left, or to draw among them.",
            "choices": list(STRATEGIES),
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of what is drawn."})
    id_column: str | None = field(
        default=None,
        metadata={"help": "Column of the ids, if the index was made with it, to tell which entry is a row's own."},
    )
    short_caption_max_tokens: NotNegative = field(
        default=30, metadata={"help": "A caption below this length is a positive, as in training."}
    )
    long_caption_max_tokens: Positive = field(
        default=500, metadata={"help": "Maximum number of tokens in a caption, as in training."}
    )
    trust_caption_columns: bool = field(
        default=False, metadata={"help": "Take captions of any length as their columns say, as in training."}
    )
    batch_size: Positive = field(default=32, metadata={"help": "Number of sequences per forward pass."})
    overwrite: bool = field(default=False, metadata={"help": "Delete the rows that the folder holds."})


def main(argv: list[str]) -> None:
    parser = CommandParser("mine", MineArguments, UniGDScriptArguments, description=__doc__)
    args, script_args = parser.parse(argv)
    state = process_state()
    index = EmbeddingIndex.load(args.index)
    made = index.description
    revision = {} if args.model else {"revision": made.revision}
    model, processor = load_checkpoint(args.model or made.model, dtype=args.dtype, **revision)
    split = script_args.dataset_train_split
    report = mine_negatives(
        model.to(state.device),
        processor,
        index,
        script_args.load_rows(split),
        args.output,
        num_negatives=args.num_negatives,
        range_min=args.range_min,
        range_max=args.range_max,
        max_score=args.max_score,
        min_score=args.min_score,
        absolute_margin=args.absolute_margin,
        relative_margin=args.relative_margin,
        sampling_strategy=args.sampling_strategy,
        seed=args.seed,
        source="/".join(filter(None, [script_args.dataset_name, script_args.dataset_config, split])),
        id_column=args.id_column,
        short_caption_max_tokens=args.short_caption_max_tokens,
        long_caption_max_tokens=args.long_caption_max_tokens,
        trust_caption_columns=args.trust_caption_columns,
        **args.image_settings(),
        **args.part_settings(),
        batch_size=args.batch_size,
        overwrite=args.overwrite,
    )
    if state.is_main_process:
        print(report)
        print(f"{report.rows} rows in {args.output}")
