"""`hf-unigd merge`: an adapter and the model beneath it as one checkpoint."""

from dataclasses import dataclass, field

from trl import TrlParser

from ..hub import merge_adapter


@dataclass
class MergeArguments:
    adapter: str = field(metadata={"help": "The adapter: a Hub id or a folder."})
    output: str = field(metadata={"help": "Folder to write."})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Data type to merge and save in: that of the model beneath, or float32, where a merge is exact.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )


def main(argv: list[str]) -> None:
    # The one thing that it takes may be given without its name.
    argv = ["--adapter", *argv] if argv and not argv[0].startswith("-") else argv
    (args,) = TrlParser((MergeArguments,), prog="hf-unigd merge").parse_args_and_config(argv)
    merge_adapter(args.adapter, args.output, dtype=args.dtype)
    print(f"The merged checkpoint is in {args.output}")
