"""`hf-unigd evaluate`: recall both ways and caption perplexity of a checkpoint on a dataset."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from trl import TrlParser

from ..hub import load_checkpoint
from ..trainer import UniGDScriptArguments, UniGDTrainer, UniGDTrainingArguments
from .inference import InferenceArguments


@dataclass
class EvaluateArguments(InferenceArguments):
    output: str | None = field(default=None, metadata={"help": "A JSON file for the metrics."})
    skip_bad_rows: bool = field(default=False, metadata={"help": "Skip bad rows, counted in the log."})


def main(argv: list[str]) -> None:
    parser = TrlParser((EvaluateArguments, UniGDScriptArguments), prog="hf-unigd evaluate")
    args, script_args = parser.parse_args_and_config(argv)
    model, processor = load_checkpoint(args.model, **args.model_kwargs())
    with TemporaryDirectory() as folder:
        training_args = UniGDTrainingArguments(
            output_dir=folder,
            per_device_eval_batch_size=args.batch_size,
            skip_bad_rows=args.skip_bad_rows,
            image_folder=args.image_folder,
            report_to=[],
        )
        rows = script_args.load_rows(script_args.dataset_test_split)
        metrics = UniGDTrainer(model, training_args, eval_dataset=rows, processing_class=processor).evaluate()
    metrics = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    for name, value in metrics.items():
        print(f"{name:<40} {value:.4f}")
    if args.output:
        Path(args.output).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
