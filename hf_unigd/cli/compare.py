"""
Do the same work with a base model and with what was tuned from it, and write one page: what was gained and what was
lost in retrieval, compositionality and generation, with bootstrap intervals, a picture, and a `model-index` for the
model card. On several devices: `accelerate launch -m hf_unigd compare ...`. An interrupted run goes on with the
benchmarks that are missing.
"""

import re
from dataclasses import dataclass, field

from ..bulk import process_state
from ..evaluation.embedders import kind_of
from ..evaluation.report import PAGE, check_own_folder, write_report
from ..outputs import OutputFolder
from .measuring import MODEL_HELP, MeasuringArguments, RowArguments, check_measured, measure
from .parser import CommandParser


@dataclass
class CompareArguments(MeasuringArguments):
    base: str = field(metadata={"help": f"The model before tuning. {MODEL_HELP}"})
    tuned: list[str] = field(metadata={"help": "The models after tuning.", "metavar": "TUNED"})
    output: OutputFolder = field(
        default="comparison",
        metadata={"help": "Folder to write the page to, and the results of each model. Those that it holds are kept."},
    )


def main(argv: list[str]) -> None:
    parser = CommandParser("compare", CompareArguments, RowArguments, description=__doc__)
    args, rows = parser.parse(argv)
    check_measured(args, rows)
    names = [args.base, *args.tuned]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{', '.join(sorted(repeated))} is given twice. Name each model once.")
    for name in names:  # before the first is measured for hours
        kind_of(name, {})
    check_own_folder(args.output)
    results = {name: measure(name, args, rows, f"{args.output}/{_file_name(name)}.json") for name in names}
    if process_state().is_main_process:
        print(write_report(results, args.output).partition("---\n\n")[2])
        print(f"Written to {args.output}/{PAGE}")


def _file_name(model: str) -> str:
    return re.sub(r"[^\w.-]+", "--", model).strip("-")
