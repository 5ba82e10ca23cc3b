"""
Do the same work with a base model and with what was tuned from it, and write one page: what was gained and what was
lost in retrieval, compositionality and generation, with bootstrap intervals, a picture, and a `model-index` for the
model card. What lmms-eval measured of the models joins in (`--lmms_results`). On several devices:
`accelerate launch -m hf_unigd compare ...`. An interrupted run goes on with the benchmarks that are missing.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from ..bulk import process_state
from ..evaluation.embedders import kind_of
from ..evaluation.lmms_results import LmmsResult, read_lmms_results
from ..evaluation.report import PAGE, check_own_folder, write_report
from ..evaluation.results import Result
from ..outputs import OutputFolder
from .measuring import MODEL_HELP, MeasuringArguments, RowArguments, check_measured, measure, measures
from .parser import CommandParser


@dataclass
class CompareArguments(MeasuringArguments):
    base: str = field(metadata={"help": f"The model before tuning. {MODEL_HELP}"})
    tuned: list[str] = field(metadata={"help": "The models after tuning.", "metavar": "TUNED"})
    output: OutputFolder = field(
        default="comparison",
        metadata={"help": "Folder for the page, and for the results of each model. Those that it holds are kept."},
    )
    lmms_results: list[str] = field(
        default_factory=list,
        metadata={
            "help": "What lmms-eval wrote (`--output_path`, with `--log_samples` for intervals): a folder or a "
            "results file of each model, in their order.",
            "metavar": "PATH",
        },
    )


def main(argv: list[str]) -> None:
    parser = CommandParser("compare", CompareArguments, RowArguments, description=__doc__)
    args, rows = parser.parse(argv)
    names = [args.base, *args.tuned]
    files = [_file_name(name) for name in names]  # also of `model` and `model/`
    if repeated := [name for name, file in zip(names, files, strict=True) if files.count(file) > 1]:
        raise ValueError(f"{repeated[0]} is given twice. Name each model once.")
    check_own_folder(args.output)
    # Both before the first is measured for hours.
    others = _read_others(args.lmms_results, names)
    is_measured = not others or measures(args, rows)
    if is_measured:
        check_measured(args, rows)
        for name in names:
            kind_of(name, {})
    results: dict[str, list[Result]] = {}
    for name in names:
        own = measure(name, args, rows, f"{args.output}/{_file_name(name)}.json") if is_measured else []
        results[name] = [*own, *others.get(name, [])]
    if process_state().is_main_process:
        print(write_report(results, args.output).partition("---\n\n")[2])
        print(f"Written to {args.output}/{PAGE}")


def _read_others(paths: list[str], names: list[str]) -> dict[str, list[LmmsResult]]:
    """What lmms-eval wrote of each model, if it is given."""
    if not paths:
        return {}
    if len(paths) != len(names):
        raise ValueError(
            f"`--lmms_results` names {len(paths)} folders or files, and {len(names)} models are compared: give one of "
            f"each, in the order {', '.join(names)}."
        )
    if len({Path(path).resolve() for path in paths}) < len(paths):
        raise ValueError("`--lmms_results` names a folder or file twice. Give the results of each model.")
    return {name: read_lmms_results(path) for name, path in zip(names, paths, strict=True)}


def _file_name(model: str) -> str:
    return re.sub(r"[^\w.-]+", "--", model).strip("-")
