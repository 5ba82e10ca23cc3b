"""
Train a small LLaVA from scratch and offline, in minutes, on drawn icons (VladVA) or on stories told with them (Sugar).
Prints what it learned and saves the checkpoint.
"""

from ..quickstart.arguments import QuickstartArguments
from ..quickstart.sugar import run_sugar
from ..quickstart.vladva import run_vladva
from .parser import CommandParser


def main(argv: list[str]) -> None:
    (args,) = CommandParser("quickstart", QuickstartArguments, description=__doc__).parse(argv)
    {"vladva": run_vladva, "sugar": run_sugar}[args.recipe](args)
