"""Measure a checkpoint on a dataset: retrieval recall in both directions, and perplexity of captions and answers."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

from ..hub import load_checkpoint
from ..outputs import OutputFile, writing
from ..settings import Positive
from ..trainer import UniGDScriptArguments, UniGDTrainer, UniGDTrainingArguments
from .arguments import CheckpointArguments
from .parser import CommandParser


def holds_metrics(file: Path) -> bool:
    """Whether a file is what this command writes."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(content, dict) and all(isinstance(value, float) for value in content.values())


MetricsFile = Annotated[str, OutputFile(".json", holds_metrics)]


@dataclass
class EvaluateArguments(CheckpointArguments):
    output: MetricsFile | None = field(default=None, metadata={"help": "JSON file to write the metrics to."})
    batch_size: Positive = field(default=32, metadata={"help": "Number of rows per forward pass."})
    skip_bad_rows: bool = field(default=False, metadata={"help": "Skip bad rows and log their number."})


def main(argv: list[str]) -> None:
    parser = CommandParser("evaluate", EvaluateArguments, UniGDScriptArguments, description=__doc__)
    args, script_args = parser.parse(argv)
    model, processor = load_checkpoint(args.model, dtype=args.dtype)
    with TemporaryDirectory() as folder:
        training_args = UniGDTrainingArguments(
            output_dir=folder,
            per_device_eval_batch_size=args.batch_size,
            skip_bad_rows=args.skip_bad_rows,
            trust_caption_columns=True,
            **args.image_settings(),
            report_to=[],
        )
        rows = script_args.load_rows(script_args.dataset_test_split)
        metrics = UniGDTrainer(model, training_args, eval_dataset=rows, processing_class=processor).evaluate()
    metrics = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    for name, value in metrics.items():
        print(f"{name:<40} {value:.4f}")
    if args.output:
        with writing(args.output) as file:
            file.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
