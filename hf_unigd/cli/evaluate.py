"""
Measure whatever embeds on a dataset: retrieval in both directions, and the perplexity of captions and answers if the
model generates. On several devices: `accelerate launch -m hf_unigd evaluate ...`.
"""

from dataclasses import dataclass, field
from typing import Annotated

from datasets import Dataset

from ..bulk import process_state
from ..evaluation.embedders import Embedder, load_embedder, probe_of
from ..evaluation.matches import ImageSettings
from ..evaluation.results import Result, ResultsFile, is_results, print_results
from ..evaluation.row_evaluation import evaluate_rows
from ..outputs import OutputFile
from ..settings import Positive
from ..trainer import UniGDScriptArguments
from .arguments import ImageArguments, dtype_field
from .parser import CommandParser


ResultsPath = Annotated[str, OutputFile(".json", is_results)]


@dataclass
class EvaluateArguments(ImageArguments):
    model: str = field(
        metadata={
            "help": "Hub id or folder of a trained checkpoint or adapter, of a plain vision-language model, or of a "
            "model that sentence-transformers loads, CLIP and SigLIP among them."
        }
    )
    dtype: str = dtype_field("Data type to load the model in.")
    image_prompt: str | None = field(
        default=None,
        metadata={"help": "Prompt after an image, for a plain vision-language model. VladVA's by default."},
    )
    text_prompt: str | None = field(
        default=None, metadata={"help": "Prompt after a text, for a plain vision-language model. VladVA's by default."}
    )
    output: ResultsPath | None = field(
        default=None, metadata={"help": "JSON file to write the results to. What it holds of this model is kept."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Throw away the results that the file holds."})
    batch_size: Positive = field(default=32, metadata={"help": "Number of sequences per forward pass."})
    skip_bad_rows: bool = field(default=False, metadata={"help": "Skip bad rows, log their reasons and count them."})


def main(argv: list[str]) -> None:
    parser = CommandParser("evaluate", EvaluateArguments, UniGDScriptArguments, description=__doc__)
    args, script_args = parser.parse(argv)
    embedder = load_embedder(
        args.model,
        batch_size=args.batch_size,
        dtype=args.dtype,
        image_prompt=args.image_prompt,
        text_prompt=args.text_prompt,
    )
    state = process_state()
    file = ResultsFile(args.output, embedder.description, probe_of(embedder), args.overwrite)
    result = _evaluate(args, script_args, embedder, file)
    if state.is_main_process:
        print_results([result])


def _evaluate(
    args: EvaluateArguments, script_args: UniGDScriptArguments, embedder: Embedder, file: ResultsFile
) -> Result:
    split = script_args.dataset_test_split
    rows = script_args.load_rows(split)
    dataset = {
        "path": script_args.dataset_name,
        "config": script_args.dataset_config,
        "split": split,
        "fingerprint": rows._fingerprint if isinstance(rows, Dataset) else None,
        "skip_bad_rows": args.skip_bad_rows,
    }
    name = "/".join(filter(None, [script_args.dataset_name, script_args.dataset_config, split]))
    found = file.find(name, dataset)
    if found is not None:
        return found
    images = ImageSettings(args.image_folder, args.max_image_pixels)
    result = evaluate_rows(embedder, rows, name, dataset, images, args.skip_bad_rows)
    file.add(result)
    return result
