"""`hf-unigd quickstart`: a small LLaVA trained on icons, from nothing to a checkpoint, in minutes."""

from trl import TrlParser

from ..quickstart.run import QuickstartArguments, run


def main(argv: list[str]) -> None:
    (args,) = TrlParser((QuickstartArguments,), prog="hf-unigd quickstart").parse_args_and_config(argv)
    run(args)
