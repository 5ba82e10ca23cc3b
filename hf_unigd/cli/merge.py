"""Merge an adapter into its base model and save the result as a whole checkpoint."""

from dataclasses import dataclass, field

from ..hub import merge_adapter
from ..outputs import NewFolder
from .arguments import dtype_field
from .parser import CommandParser


@dataclass
class MergeArguments:
    adapter: str = field(metadata={"help": "Adapter: a Hub id or a folder."})
    output: NewFolder = field(metadata={"help": "New or empty folder to write."})
    dtype: str = dtype_field(
        "Data type to merge and save in. The merge is exact in float32. With `auto` it is the base model's data type."
    )


def main(argv: list[str]) -> None:
    (args,) = CommandParser("merge", MergeArguments, description=__doc__).parse(argv)
    merge_adapter(args.adapter, args.output, dtype=args.dtype)
    print(f"The merged checkpoint is in {args.output}")
