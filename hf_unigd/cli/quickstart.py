"""`hf-unigd quickstart`: a small LLaVA trained on icons or stories, from nothing to a checkpoint, in minutes."""

from trl import TrlParser

from ..quickstart.run import QuickstartArguments, run
from ..quickstart.sugar import run_sugar


def main(argv: list[str]) -> None:
    (args,) = TrlParser((QuickstartArguments,), prog="hf-unigd quickstart").parse_args_and_config(argv)
    if args.recipe == "sugar":
        run_sugar(args)
    else:
        run(args)
