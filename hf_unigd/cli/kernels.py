"""Save the alignment kernels as a repository for the `kernels` library, ready to be pushed."""

from dataclasses import dataclass, field
from pathlib import Path

from ..kernels.export import export
from ..outputs import NewFolder, new_folder
from .parser import CommandParser


@dataclass
class KernelsArguments:
    action: str = field(metadata={"metavar": "export", "help": "What to do.", "choices": ["export"]})
    directory: NewFolder = field(metadata={"metavar": "DIR", "help": "New or empty folder to write."})


def main(argv: list[str]) -> None:
    (args,) = CommandParser("kernels", KernelsArguments, description=__doc__).parse(argv)
    with new_folder(args.directory) as folder:
        build = export(folder).relative_to(folder)
    print(f"Wrote {Path(args.directory, build)}")
