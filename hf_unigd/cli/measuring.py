"""What `evaluate` and `compare` have in common: on what they measure a model, and how."""

import logging
from dataclasses import dataclass, field

from datasets import Dataset

from ..bulk import process_state
from ..evaluation.benchmark_data import NotFetchedError, commit_of_dataset
from ..evaluation.benchmarking import choose_benchmarks, run_benchmark
from ..evaluation.embedders import CannotMeasureError, Embedder, load_embedder, probe_of
from ..evaluation.matches import ImageSettings
from ..evaluation.results import Result, ResultsFile
from ..evaluation.row_evaluation import evaluate_rows
from ..settings import Positive
from ..trainer import UniGDScriptArguments
from .arguments import ImageArguments, dtype_field


logger = logging.getLogger(__name__)

MODEL_HELP = (
    "Hub id or folder of a trained checkpoint or adapter, of a plain vision-language model, or of a model that "
    "sentence-transformers loads, CLIP and SigLIP among them."
)


@dataclass
class RowArguments(UniGDScriptArguments):
    """The rows to measure on, if there are any."""

    def __post_init__(self):
        if self.dataset_name is not None or self.datasets:
            super().__post_init__()


@dataclass(kw_only=True)
class MeasuringArguments(ImageArguments):
    benchmarks: list[str] = field(
        default_factory=list,
        metadata={"help": "Benchmarks, and groups of them (`vladva`, `sugar`, `scenes`)."},
    )
    benchmark_folder: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the files of benchmarks that have to be fetched, those of each in one of its name."
        },
    )
    dtype: str = dtype_field("Data type to load models in.")
    image_prompt: str | None = field(
        default=None,
        metadata={"help": "Prompt after an image, for plain vision-language models. VladVA's by default."},
    )
    text_prompt: str | None = field(
        default=None,
        metadata={"help": "Prompt after a text, for plain vision-language models. VladVA's by default."},
    )
    batch_size: Positive = field(default=32, metadata={"help": "Number of sequences per forward pass."})
    skip_bad_rows: bool = field(
        default=False,
        metadata={"help": "Skip bad rows of `dataset_name`, log their reasons and count them."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Throw away the results that the output holds."})


def measures(args: MeasuringArguments, rows: RowArguments) -> bool:
    """Whether there are benchmarks or rows to measure on."""
    return bool(args.benchmarks) or rows.dataset_name is not None


def check_measured(args: MeasuringArguments, rows: RowArguments) -> None:
    """
    Raises:
        ValueError: there is nothing to measure on, or more than one dataset, or a benchmark is unknown.
    """
    choose_benchmarks(args.benchmarks)
    if rows.datasets:
        raise ValueError("This command reads one dataset. Give `dataset_name` instead of `datasets`.")
    if not measures(args, rows):
        raise ValueError("There is nothing to measure on. Give `benchmarks`, or rows by `dataset_name`.")


def measure(model: str, args: MeasuringArguments, rows: RowArguments, output: str | None) -> list[Result]:
    """
    Measures a model on benchmarks and rows. What its file of results holds is not measured again. Benchmarks that ask
    for what the model does not do are left out, with a line in the log, and so are those of a group whose files the
    user has not fetched.

    Args:
        model: Its name.
        args: The settings.
        rows: The rows, if there are any.
        output: The file of its results; None for none.

    Raises:
        ValueError: nothing could be measured, or what a benchmark that was named by itself needs is not there.
    """
    is_plain = {"image_prompt": args.image_prompt, "text_prompt": args.text_prompt}
    embedder = load_embedder(model, batch_size=args.batch_size, dtype=args.dtype, **is_plain)
    file = ResultsFile(output, embedder.description, probe_of(embedder), args.overwrite)
    show_progress = process_state().is_main_process
    results = []
    for benchmark in choose_benchmarks(args.benchmarks):
        try:
            results.append(run_benchmark(embedder, benchmark, args.benchmark_folder, file, show_progress))
        except (CannotMeasureError, NotFetchedError) as error:
            # What a group has beside what the user has fetched is no reason to stop.
            if isinstance(error, NotFetchedError) and benchmark.name in args.benchmarks:
                raise
            logger.warning("%s is left out: %s", benchmark.title, error)
    if args.benchmarks and not results:
        raise ValueError(f"{model} cannot be measured on any of these benchmarks; the log has the reasons.")
    if rows.dataset_name is not None:
        results.append(_measure_rows(embedder, args, rows, file))
    return results


def _measure_rows(embedder: Embedder, args: MeasuringArguments, arguments: RowArguments, file: ResultsFile) -> Result:
    split = arguments.dataset_test_split
    rows = arguments.load_rows(split)
    path = str(arguments.dataset_name)
    dataset = {
        "path": path,
        "config": arguments.dataset_config,
        "split": split,
        "revision": commit_of_dataset(path),
        "fingerprint": rows._fingerprint if isinstance(rows, Dataset) else None,
        "skip_bad_rows": args.skip_bad_rows,
    }
    name = "/".join(filter(None, [path, arguments.dataset_config, split]))
    found = file.find(name, dataset)
    if found is not None:
        return found
    images = ImageSettings(args.image_folder, args.max_image_pixels)
    result = evaluate_rows(embedder, rows, name, dataset, images, args.skip_bad_rows)
    file.add(result)
    return result
