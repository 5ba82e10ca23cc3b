"""`hf-unigd explain`: which images and sentences of two sequences the alignment kernel brings together."""

import sys
from dataclasses import dataclass, field

import torch
from datasets import IterableDataset
from trl import TrlParser

from ..data import Example, ExampleDataset, RowError, RowParser, TeacherArguments, Teachers
from ..evaluation.alignment import align_slices, embed_slices
from ..evaluation.figures import draw_alignment
from ..hub import load_checkpoint
from ..trainer import UniGDScriptArguments
from .inference import accelerator


DESCRIPTION = (
    "Draws two rows of `--dataset_name` along the sides of a heat map: how often an alignment, drawn with the "
    "kernel's weights, brings each two of their images and sentences together. Rows are those of the training split, "
    "by their number as in training; sequences of your own are two lines of a .jsonl file. Slices are compared as the "
    "teachers see them, as in the target of training, or with `--model` by that model's own embeddings."
)


@dataclass
class ExplainArguments:
    output: str = field(default="alignment.png", metadata={"help": "The picture to write."})
    model: str | None = field(
        default=None,
        metadata={"help": "A trained checkpoint, to use its embeddings of the slices, not the teachers'."},
    )
    alignment_bandwidth: float = field(default=1.0, metadata={"help": "As in training."})
    alignment_normalization: str = field(
        default="content", metadata={"help": "As in training.", "choices": ["cosine", "content"]}
    )
    triple_kernel: bool = field(default=True, metadata={"help": "Of the teachers, as in training."})
    image_folder: str | None = field(default=None, metadata={"help": "Where relative image paths start."})


def main(argv: list[str]) -> None:
    parser = TrlParser(
        (ExplainArguments, UniGDScriptArguments, TeacherArguments),
        prog="hf-unigd explain",
        usage="%(prog)s A B --dataset_name D [--model M] [--output FILE.png] ...",
        description=DESCRIPTION,
    )
    for name, place in (("A", "down the side"), ("B", "along the top")):
        parser.add_argument(name, type=int, help=f"Number of the row that is drawn {place}.")
    args, script_args, teacher_args, numbers = parser.parse_args_and_config(argv)
    rows = script_args.load_rows(script_args.dataset_train_split)
    if isinstance(rows, IterableDataset):
        raise ValueError("Leave `dataset_streaming` out: rows are chosen by their number.")
    # With these limits every `caption` is a long one, which is part of its sequence.
    examples = ExampleDataset(rows, RowParser(len, 0, sys.maxsize, args.image_folder, teacher_args.splitter))
    a, b = _read("A", numbers.A, examples), _read("B", numbers.B, examples)

    settings: dict = {"bandwidth": args.alignment_bandwidth, "normalization": args.alignment_normalization}
    if args.model:
        model, processor = load_checkpoint(args.model, dtype="auto")
        model = model.to(accelerator())
        x, y = (embed_slices(model, processor, example, teacher_args.splitter) for example in (a, b))
        seen = f"by the embeddings of {args.model}"
    else:
        teachers = Teachers(teacher_args, accelerator())
        x, y = teachers(a.slices), teachers(b.slices)
        settings["modality_columns"] = teachers.modality_columns(args.triple_kernel)
        settings["x_modalities"] = torch.tensor([one.modality for one in a.slices])
        settings["y_modalities"] = torch.tensor([one.modality for one in b.slices])
        seen = "as the teachers see them"
        if teachers.truncated:
            print(f"{teachers.truncated} texts are longer than an encoder takes, and were cut as it does.")
    posterior, similarity = align_slices(x, y, **settings)
    title = (
        f"Rows {numbers.A} (down) and {numbers.B} (across) {seen}: similarity {similarity:.3f}\n"
        f"({args.alignment_normalization}-normalised kernel, δ = {args.alignment_bandwidth:g})"
    )
    contents = [[one.content for one in example.slices] for example in (a, b)]
    draw_alignment(contents[0], contents[1], posterior, args.output, title)
    print(f"{title}\nPicture in {args.output}")


def _read(name: str, number: int, examples: ExampleDataset) -> Example:
    if not 0 <= number < len(examples):
        raise ValueError(f"{name}: there is no row {number}; `dataset_name` has the rows 0 to {len(examples) - 1}.")
    try:
        return examples.parse(number)
    except RowError as error:
        raise ValueError(f"{name}: {error}") from error
