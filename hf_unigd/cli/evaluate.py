"""
Measure whatever embeds, on benchmarks (`--benchmarks vladva sugar scenes`, or single ones by name), and on a dataset:
retrieval in both directions, and the perplexity of captions and answers if the model generates. On several devices:
`accelerate launch -m hf_unigd evaluate ...`. An interrupted run goes on with the benchmarks that are missing.
"""

from dataclasses import dataclass, field
from typing import Annotated

from ..bulk import process_state
from ..evaluation.results import Result, is_results, print_results
from ..evaluation.tables import load_groups, render_table
from ..outputs import OutputFile
from .measuring import MODEL_HELP, MeasuringArguments, RowArguments, check_measured, measure
from .parser import CommandParser


ResultsPath = Annotated[str, OutputFile(".json", is_results)]


@dataclass
class EvaluateArguments(MeasuringArguments):
    model: str = field(metadata={"help": MODEL_HELP})
    output: ResultsPath | None = field(
        default=None, metadata={"help": "JSON file to write the results to. What it holds of this model is kept."}
    )


def main(argv: list[str]) -> None:
    parser = CommandParser("evaluate", EvaluateArguments, RowArguments, description=__doc__)
    args, rows = parser.parse(argv)
    check_measured(args, rows)
    results = measure(args.model, args, rows, args.output)
    if process_state().is_main_process:
        print_results(results)
        for name in args.benchmarks:
            _print_tables(name, args.model, results)


def _print_tables(name: str, model: str, results: list[Result]) -> None:
    if name not in load_groups():
        return
    group = load_groups()[name]
    print(f"\n{group.title}: {group.paper}")
    for table in group.tables:
        print(f"\n{table.title}\n\n{render_table(table, {model: results})}")
