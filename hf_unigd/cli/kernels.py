"""hf-unigd kernels: the alignment kernels as a repository for the `kernels` library."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..kernels.export import export


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="hf-unigd kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("export", help="write the repository, ready to be pushed")
    command.add_argument("directory", metavar="DIR", help="a new or empty folder")
    arguments = parser.parse_args(argv)
    try:
        print(f"Wrote {export(arguments.directory)}")
    except ValueError as error:
        parser.error(str(error))
