"""Save the alignment kernels as a repository for the `kernels` library, ready to be pushed."""

from dataclasses import dataclass, field

from ..kernels.export import export
from .parser import CommandParser


@dataclass
class KernelsArguments:
    action: str = field(metadata={"metavar": "export", "help": "What to do.", "choices": ["export"]})
    directory: str = field(metadata={"metavar": "DIR", "help": "New or empty folder to write."})


def main(argv: list[str]) -> None:
    (args,) = CommandParser("kernels", KernelsArguments, description=__doc__).parse(argv)
    print(f"Wrote {export(args.directory)}")
