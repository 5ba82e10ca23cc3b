"""Entry point of `hf-unigd`."""

import sys
from importlib import import_module

from .. import __version__


COMMANDS = {
    "quickstart": "Train a small LLaVA on icons, from nothing to a checkpoint, in minutes",
    "train": "Train a vision-language model with the joint objective",
    "embed-slices": "Run the structure loss's teachers over a dataset once",
    "evaluate": "Recall both ways and caption perplexity of a checkpoint on a dataset",
    "index": "Embed a dataset into a folder that can be searched and asked",
    "search": "Search an index by text, image, or both",
    "answer": "Answer a question with what an index knows about it",
    "explain": "Draw which images and sentences of two sequences the alignment kernel brings together",
    "push": "Push a saved checkpoint to the Hub in one commit",
    "doctor": "Examine a checkpoint: tensors, prompts, probe, and which of its consumers will work here",
    "merge": "Merge an adapter into the model beneath it",
    "export": "Write a checkpoint as a plain LLaVA that servers know, without remote code",
    "generate": "Generate text from an image, a text, or both",
    "kernels": "Export the alignment kernels as a repository for the kernels library",
}


def main(argv: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        listing = "\n".join(f"  {name:<14} {text}" for name, text in COMMANDS.items())
        print(f"usage: hf-unigd COMMAND [--config FILE.yaml] [--help] ...\n\n{listing}")
        return
    command, *rest = arguments
    if command == "--version":
        print(__version__)
        return
    if command not in COMMANDS:
        sys.exit(f"hf-unigd: there is no command {command!r}; there are {', '.join(COMMANDS)}")
    module = import_module(f".{command.replace('-', '_')}", __package__)
    try:
        module.main(rest)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        # What a user can mend gets its message alone; anything else is a fault of ours and keeps its traceback.
        sys.exit(f"hf-unigd {command}: {error}")
