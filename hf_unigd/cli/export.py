"""
Save a checkpoint as a plain model of its backbone's family, for servers that know that family. The export needs no
remote code. The files of sentence-transformers beside it describe how to embed.
"""

from dataclasses import dataclass, field

from ..hub import export_checkpoint
from ..hub.export import TARGETS
from ..outputs import NewFolder
from .arguments import dtype_field
from .parser import CommandParser


@dataclass
class ExportArguments:
    model: str = field(metadata={"help": "Trained checkpoint or adapter: a Hub id or a folder."})
    output: NewFolder = field(metadata={"help": "New or empty folder to write."})
    to: str = field(
        default="llava",
        metadata={"help": "Family of the plain model. `vlm` is the backbone's own.", "choices": list(TARGETS)},
    )
    dtype: str = dtype_field("Data type to save in.")


def main(argv: list[str]) -> None:
    (args,) = CommandParser("export", ExportArguments, description=__doc__).parse(argv)
    architecture = export_checkpoint(args.model, args.output, args.to, dtype=args.dtype)
    print(f"{args.output} holds a plain {architecture} with sentence-transformers' modules")
