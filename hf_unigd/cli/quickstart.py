"""
Train a small LLaVA from scratch and offline, in minutes, on drawn icons (VladVA), on stories told with them (Sugar),
or on scenes composed of them (VladVA with hard negatives). Prints what it learned and saves the checkpoint.
"""

from ..quickstart.arguments import QuickstartArguments
from ..quickstart.scenes import run_scenes
from ..quickstart.sugar import run_sugar
from ..quickstart.vladva import run_vladva
from .parser import CommandParser


def main(argv: list[str]) -> None:
    (args,) = CommandParser("quickstart", QuickstartArguments, description=__doc__).parse(argv)
    {"vladva": run_vladva, "sugar": run_sugar, "scenes": run_scenes}[args.recipe](args)
