"""
Embed the images and sentences of a dataset once with the frozen teachers of the structure loss, so that training with
`--slice_features` need not run the teachers. An interrupted run continues where it stopped when it is started again.
"""

from dataclasses import dataclass, field

from datasets import IterableDataset
from transformers import AutoTokenizer

from ..data import ExampleDataset, RowParser, TeacherArguments, write_slice_features
from ..data.formats import check_columns
from ..inputs import reading
from ..outputs import OutputFolder
from ..settings import NotNegative, Positive
from ..trainer import UniGDScriptArguments
from .arguments import ImageArguments, accelerator
from .parser import CommandParser


@dataclass
class EmbedSlicesArguments(ImageArguments):
    model: str = field(
        metadata={"help": "Model that will be trained. Its tokenizer measures captions, which are short or long."}
    )
    output: OutputFolder = field(default="slice_features", metadata={"help": "Folder to write, or to continue in."})
    batch_size: Positive = field(default=64, metadata={"help": "Number of images or sentences per forward pass."})
    rows_per_part: Positive = field(
        default=1000, metadata={"help": "Number of rows per file. An interrupted run loses at most these."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Delete the features that the folder holds."})
    short_caption_max_tokens: NotNegative = field(
        default=0,
        metadata={
            "help": "Same value as in training, where it counts as 0 if `contrastive_weight` is 0: captions below the "
            "limit serve the contrastive loss alone."
        },
    )
    long_caption_max_tokens: Positive = field(default=500, metadata={"help": "Same value as in training."})
    skip_bad_rows: bool = field(default=False, metadata={"help": "Skip bad rows, with a warning."})


def main(argv: list[str]) -> None:
    parser = CommandParser(
        "embed-slices", EmbedSlicesArguments, UniGDScriptArguments, TeacherArguments, description=__doc__
    )
    args, script_args, teacher_args = parser.parse(argv)
    with reading(args.model):
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    row_parser = RowParser(
        lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]),
        args.short_caption_max_tokens,
        args.long_caption_max_tokens,
        splitter=teacher_args.splitter,
        **args.image_settings(),
    )
    rows = script_args.load_rows(script_args.dataset_train_split)
    if isinstance(rows, IterableDataset):
        raise ValueError("Leave `dataset_streaming` out: features are stored by the number of the row.")
    check_columns(rows.column_names)
    examples = ExampleDataset(rows, row_parser, skip_bad_rows=args.skip_bad_rows)
    features = write_slice_features(
        examples,
        teacher_args,
        args.output,
        accelerator(),
        args.batch_size,
        args.rows_per_part,
        args.overwrite,
    )
    print(f"{len(features.features)} distinct slices of {len(features.rows)} rows in {args.output}")
