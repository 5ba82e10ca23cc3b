"""
Measure whatever embeds, on benchmarks (`--benchmarks vladva sugar scenes`, or single ones by name) or on a dataset:
retrieval in both directions, and the perplexity of captions and answers if the model generates. On several devices:
`accelerate launch -m hf_unigd evaluate ...`. An interrupted run goes on with the benchmarks that are missing.
"""

from dataclasses import dataclass, field
from typing import Annotated

from datasets import Dataset

from ..bulk import process_state
from ..evaluation.benchmarking import choose_benchmarks, run_benchmark
from ..evaluation.embedders import Embedder, load_embedder, probe_of
from ..evaluation.matches import ImageSettings
from ..evaluation.results import Result, ResultsFile, is_results, print_results
from ..evaluation.row_evaluation import evaluate_rows
from ..evaluation.tables import load_groups, render_table
from ..outputs import OutputFile
from ..settings import Positive
from ..trainer import UniGDScriptArguments
from .arguments import ImageArguments, dtype_field
from .parser import CommandParser


ResultsPath = Annotated[str, OutputFile(".json", is_results)]


@dataclass
class RowArguments(UniGDScriptArguments):
    """The rows to evaluate on, if there are any."""

    def __post_init__(self):
        if self.dataset_name is not None or self.datasets:
            super().__post_init__()


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
    benchmarks: list[str] | None = field(
        default=None, metadata={"help": "Benchmarks and groups of them, in place of `dataset_name`."}
    )
    benchmark_folder: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the files of benchmarks that have to be fetched, those of each in one of its name."
        },
    )
    output: ResultsPath | None = field(
        default=None, metadata={"help": "JSON file to write the results to. What it holds of this model is kept."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Throw away the results that the file holds."})
    batch_size: Positive = field(default=32, metadata={"help": "Number of sequences per forward pass."})
    skip_bad_rows: bool = field(default=False, metadata={"help": "Skip bad rows, log their reasons and count them."})


def main(argv: list[str]) -> None:
    parser = CommandParser("evaluate", EvaluateArguments, RowArguments, description=__doc__)
    args, script_args = parser.parse(argv)
    if (args.benchmarks is None) == (script_args.dataset_name is None):
        raise ValueError("Give either `benchmarks` or `dataset_name`.")
    benchmarks = choose_benchmarks(args.benchmarks or [])
    embedder = load_embedder(
        args.model,
        batch_size=args.batch_size,
        dtype=args.dtype,
        image_prompt=args.image_prompt,
        text_prompt=args.text_prompt,
    )
    is_main = process_state().is_main_process
    file = ResultsFile(args.output, embedder.description, probe_of(embedder), args.overwrite)
    results = [run_benchmark(embedder, each, args.benchmark_folder, file, is_main) for each in benchmarks]
    if args.benchmarks is None:
        results.append(_evaluate_rows(args, script_args, embedder, file))
    if is_main:
        print_results(results)
        for name in args.benchmarks or []:
            _print_tables(name, args.model, results)


def _print_tables(name: str, model: str, results: list[Result]) -> None:
    if name not in load_groups():
        return
    group = load_groups()[name]
    print(f"\n{group.title}: {group.paper}")
    for table in group.tables:
        print(f"\n{table.title}\n\n{render_table(table, {model: results})}")


def _evaluate_rows(
    args: EvaluateArguments, script_args: RowArguments, embedder: Embedder, file: ResultsFile
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
