"""`hf-unigd embed-slices`: what the teachers of the structure loss see of a dataset, once, beside the data."""

from dataclasses import dataclass, field

from datasets import IterableDataset
from transformers import AutoTokenizer
from trl import TrlParser

from ..data import ExampleDataset, RowParser, TeacherArguments, write_slice_features
from ..data.rows import check_columns
from ..trainer import UniGDScriptArguments
from .inference import accelerator


@dataclass
class EmbedSlicesArguments:
    model: str = field(metadata={"help": "Model to be trained: its tokenizer tells long captions from short ones."})
    output: str = field(default="slice_features", metadata={"help": "Folder to write, or to go on with."})
    batch_size: int = field(default=64, metadata={"help": "Images or sentences a forward pass."})
    rows_per_part: int = field(default=1000, metadata={"help": "Rows that an interruption can cost."})
    overwrite: bool = field(default=False, metadata={"help": "Throw away what the folder has."})
    short_caption_max_tokens: int = field(
        default=0, metadata={"help": "As in training, where it is 0 unless `contrastive_weight` is above 0."}
    )
    long_caption_max_tokens: int = field(default=500, metadata={"help": "As in training."})
    image_folder: str | None = field(default=None, metadata={"help": "Where relative image paths start."})
    skip_bad_rows: bool = field(default=False, metadata={"help": "Leave bad rows without features, with a warning."})


def main(argv: list[str]) -> None:
    parser = TrlParser((EmbedSlicesArguments, UniGDScriptArguments, TeacherArguments), prog="hf-unigd embed-slices")
    args, script_args, teacher_args = parser.parse_args_and_config(argv)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    row_parser = RowParser(
        lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]),
        args.short_caption_max_tokens,
        args.long_caption_max_tokens,
        args.image_folder,
        teacher_args.splitter,
    )
    rows = script_args.load_rows(script_args.dataset_train_split)
    if isinstance(rows, IterableDataset):
        raise ValueError("Leave `dataset_streaming` out: slice features belong to rows by their number.")
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
