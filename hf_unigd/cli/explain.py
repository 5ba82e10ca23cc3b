"""
Plot how the alignment kernel matches the images and sentences of two rows of a dataset. The rows are the sides of a
heat map, which shows how often an alignment drawn with the kernel's weights matches each image or sentence of one with
each of the other. A and B are row numbers of the training split, counted as in training. To compare sequences of your
own, write them into a .jsonl file of two lines. Images and sentences are compared by the embeddings of the teachers,
as in the target of training, or by those of `--model`.
"""

import sys
from dataclasses import dataclass, field
from typing import Annotated

import torch
from datasets import IterableDataset

from ..data import Example, ExampleDataset, RowError, RowParser, TeacherArguments, Teachers
from ..evaluation.alignment import align_slices, embed_slices
from ..evaluation.figures import draw_alignment
from ..hub import load_checkpoint
from ..settings import AtLeast, NotNegative
from ..trainer import UniGDScriptArguments
from .arguments import FigureFile, ImageArguments, accelerator
from .parser import CommandParser


@dataclass
class ExplainArguments(ImageArguments):
    a: NotNegative = field(metadata={"help": "Number of the row along the side of the heat map."})
    b: NotNegative = field(metadata={"help": "Number of the row along the top of the heat map."})
    output: FigureFile = field(default="alignment.png", metadata={"help": "PNG file to write."})
    model: str | None = field(
        default=None, metadata={"help": "Trained checkpoint whose embeddings replace those of the teachers."}
    )
    alignment_bandwidth: Annotated[float, AtLeast(0, exclusive=True)] = field(
        default=1.0, metadata={"help": "Same value as in training."}
    )
    alignment_normalization: str = field(
        default="content", metadata={"help": "Same value as in training.", "choices": ["cosine", "content"]}
    )
    triple_kernel: bool = field(
        default=True, metadata={"help": "Same value as in training. It concerns the teachers' embeddings alone."}
    )


def main(argv: list[str]) -> None:
    parser = CommandParser("explain", ExplainArguments, UniGDScriptArguments, TeacherArguments, description=__doc__)
    args, script_args, teacher_args = parser.parse(argv)
    rows = script_args.load_rows(script_args.dataset_train_split)
    if isinstance(rows, IterableDataset):
        raise ValueError("Leave `dataset_streaming` out: rows are chosen by their number.")
    # With these limits every `caption` is a long one, which is part of its sequence.
    parser_of_rows = RowParser(len, 0, sys.maxsize, splitter=teacher_args.splitter, **args.image_settings())
    if args.model:
        model, processor = load_checkpoint(args.model, dtype="auto")
        model = model.to(accelerator())
        parser_of_rows.instruction = processor.get_instruction("query")  # as in training
    examples = ExampleDataset(rows, parser_of_rows)
    a, b = parse_row("A", args.a, examples), parse_row("B", args.b, examples)

    settings: dict = {"bandwidth": args.alignment_bandwidth, "normalization": args.alignment_normalization}
    if args.model:
        x, y = (embed_slices(model, processor, example, teacher_args.splitter) for example in (a, b))
        embedder = f"by {args.model}"
    else:
        teachers = Teachers(teacher_args, accelerator())
        x, y = teachers(a.slices), teachers(b.slices)
        settings["modality_columns"] = teachers.modality_columns(args.triple_kernel)
        settings["x_modalities"] = torch.tensor([one.modality for one in a.slices])
        settings["y_modalities"] = torch.tensor([one.modality for one in b.slices])
        embedder = "by the teachers"
        if teachers.truncated:
            print(f"{teachers.truncated} texts are longer than an encoder accepts; it truncated them, as in training.")
    posterior, similarity = align_slices(x, y, **settings)
    title = (
        f"Rows {args.a} (down) and {args.b} (across), embedded {embedder}: similarity {similarity:.3f}\n"
        f"({args.alignment_normalization}-normalised kernel, δ = {args.alignment_bandwidth:g})"
    )
    contents = [[one.content for one in example.slices] for example in (a, b)]
    draw_alignment(contents[0], contents[1], posterior, args.output, title)
    print(f"{title}\nThe heat map is in {args.output}")


def parse_row(argument: str, number: int, examples: ExampleDataset) -> Example:
    """
    Row `number`, which the command's `argument` names.

    Raises:
        ValueError: there is no such row, or it is bad.
    """
    if number >= len(examples):
        raise ValueError(
            f"{argument}: there is no row {number}. The rows of `dataset_name` are numbered 0 to {len(examples) - 1}."
        )
    try:
        return examples.parse(number)
    except RowError as error:
        raise ValueError(f"{argument}: {error}") from error
