"""
Embed the images and sentences of a dataset once with the frozen teachers of the structure loss, so that training with
`--slice_features` need not run the teachers. On several devices: `accelerate launch -m hf_unigd embed-slices ...`. An
interrupted run continues where it stopped when it is started again.
"""

from dataclasses import dataclass, field

from transformers import AutoTokenizer

from ..bulk import process_state, write_slice_features
from ..data import (
    DatasetMixture,
    DatasetSource,
    ExampleStream,
    MixedDataset,
    RowParser,
    TeacherArguments,
    make_examples,
)
from ..data.lengths import TokenCounter
from ..inputs import reading
from ..outputs import OutputFolder
from ..settings import NotNegative, Positive
from ..trainer import UniGDScriptArguments
from .arguments import ImageArguments
from .parser import CommandParser


@dataclass
class EmbedSlicesArguments(ImageArguments):
    model: str = field(
        metadata={"help": "Model that will be trained. Its tokenizer measures captions, which are short or long."}
    )
    output: OutputFolder = field(default="slice_features", metadata={"help": "Folder to write, or to continue in."})
    batch_size: Positive = field(default=64, metadata={"help": "Number of images or sentences per forward pass."})
    num_workers: NotNegative = field(
        default=0, metadata={"help": "Number of processes that open and process images beside the teachers."}
    )
    rows_per_part: Positive = field(
        default=1000,
        metadata={"help": "Number of rows per part. An interrupted run loses at most these, per process and worker."},
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Delete the features that the folder holds, or what a run has begun."}
    )
    short_caption_max_tokens: NotNegative = field(
        default=0,
        metadata={
            "help": "Same value as in training, where it counts as 0 if `contrastive_weight` is 0: captions below the "
            "limit serve the contrastive loss alone."
        },
    )
    long_caption_max_tokens: Positive = field(default=500, metadata={"help": "Same value as in training."})
    trust_caption_columns: bool = field(default=False, metadata={"help": "Same value as in training."})
    skip_bad_rows: bool = field(default=False, metadata={"help": "Skip bad rows, with a warning."})


def main(argv: list[str]) -> None:
    parser = CommandParser(
        "embed-slices", EmbedSlicesArguments, UniGDScriptArguments, TeacherArguments, description=__doc__
    )
    args, script_args, teacher_args = parser.parse(argv)
    with reading(args.model):
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    row_parser = RowParser(
        TokenCounter(tokenizer),
        args.short_caption_max_tokens,
        args.long_caption_max_tokens,
        args.trust_caption_columns,
        splitter=teacher_args.splitter,
        **args.image_settings(),
    )
    rows = script_args.load_train_rows()
    sources = rows.sources if isinstance(rows, DatasetMixture) else [DatasetSource(rows, script_args.dataset_name)]
    parts = []
    for source in sources:
        part = make_examples(source.rows, source.parser(row_parser), args.skip_bad_rows, check_rows="off")
        if isinstance(part, ExampleStream):
            raise ValueError("Leave streaming out: features are stored by the number of the row.")
        parts.append(part)
    examples = MixedDataset(parts)
    state = process_state()
    features = write_slice_features(
        examples,
        teacher_args,
        args.output,
        state.device,
        batch_size=args.batch_size,
        rows_per_part=args.rows_per_part,
        num_workers=args.num_workers,
        overwrite=args.overwrite,
    )
    if state.is_main_process:
        print(f"{len(features.features)} distinct slices of {len(features.rows)} rows in {args.output}")
