"""`hf-unigd export`: a checkpoint as a plain model of its backbone's family, for servers that know that family."""

from dataclasses import dataclass, field

from trl import TrlParser

from ..hub import export_checkpoint
from ..hub.export import TARGETS


@dataclass
class ExportArguments:
    model: str = field(metadata={"help": "A trained checkpoint or adapter: a Hub id or a folder."})
    output: str = field(metadata={"help": "Folder to write."})
    to: str = field(
        default="llava",
        metadata={"help": "`llava`, or `vlm`: whatever family the backbone is of.", "choices": list(TARGETS)},
    )
    dtype: str = field(
        default="auto",
        metadata={"help": "Data type to save in.", "choices": ["auto", "bfloat16", "float16", "float32"]},
    )


def main(argv: list[str]) -> None:
    # The one thing that it takes may be given without its name.
    argv = ["--model", *argv] if argv and not argv[0].startswith("-") else argv
    (args,) = TrlParser((ExportArguments,), prog="hf-unigd export").parse_args_and_config(argv)
    architecture = export_checkpoint(args.model, args.output, args.to, dtype=args.dtype)
    print(f"{architecture} with sentence-transformers' modules in {args.output}")
