"""Entry point of `hf-unigd`. A command's module, and with it torch, is imported when the command runs."""

import sys
from importlib import import_module

from ..version import __version__
from .errors import one_line


COMMANDS = {
    "quickstart": "Train a small LLaVA on drawn icons in minutes, offline, and show what it finds and says",
    "caption": "Add the captions that a dataset of images lacks, with any vision-language model",
    "plan": "Estimate the memory and the time that a recipe takes",
    "train": "Train a vision-language model with the joint objective",
    "embed-slices": "Embed the images and sentences of a dataset with the structure loss's teachers",
    "evaluate": "Measure whatever embeds on benchmarks, or on a dataset",
    "prompts": "Compare embedding prompts on images and captions, and name the best pair to train with",
    "compare": "Compare models on benchmarks: what was gained, and what was lost",
    "embed": "Embed a dataset into a Parquet file of vectors",
    "index": "Embed a dataset into a searchable index",
    "search": "Search an index with a text, images, or both",
    "answer": "Answer a question with what an index holds about it",
    "mine": "Add hard negatives to a dataset, from an index of what its rows are to find",
    "generate": "Generate text from images, a text, or both",
    "serve": "Serve a model: embeddings and chats, and search and answers from an index, by OpenAI's API",
    "app": "Write a folder that runs as a Space of the Hub: a page and a server of a model",
    "explain": "Plot how the alignment kernel matches the images and sentences of two rows",
    "push": "Upload a saved checkpoint to the Hub in one commit",
    "doctor": "Check a checkpoint, and which libraries can load it here",
    "merge": "Merge an adapter into its base model",
    "export": "Save a checkpoint as a plain model of its backbone's family, for servers without remote code",
    "kernels": "Save the alignment kernels as a repository for the kernels library",
}

HELP = """\
usage: hf-unigd COMMAND [ARGUMENT ...] [--NAME VALUE ...] [--config FILE.yaml]
       hf-unigd COMMAND --help
       hf-unigd --version

Vision-language models that embed, retrieve and generate.

commands:
{commands}

`hf-unigd COMMAND --help` lists the arguments of a command. Each argument may also be a key of a YAML file that
`--config FILE.yaml` names; an argument on the command line overrides the file:

  hf-unigd train --config recipe.yaml --learning_rate 5e-5

An error is one line; `--debug` at the end of the command line shows where it comes from.
"""

# What an interrupted command leaves, and how to go on.
AFTER_INTERRUPTION = {
    "train": " The checkpoints that were saved are kept: `--resume_from_checkpoint true` goes on from the last.",
    "caption": " The parts that were captioned are kept: the same command goes on from there.",
    "embed": " The parts that were embedded are kept: the same command goes on from there.",
    "prompts": " What the prompts have been run on is kept: the same command goes on from there.",
    "index": " The rows that were indexed are kept: the same command goes on from there.",
    "evaluate": " With `--output`, the benchmarks that were measured are kept: the same command goes on from there.",
    "compare": " The benchmarks that were measured are kept: the same command goes on from there.",
    "mine": " The parts that were mined are kept: the same command goes on from there.",
    "embed-slices": " The features that were written are kept: the same command goes on from there.",
}


def main(argv: list[str] | None = None) -> None:
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(HELP.format(commands="\n".join(f"  {name:<14} {line}" for name, line in COMMANDS.items())), end="")
        return
    if command == "--version":
        print(__version__)
        return
    if command not in COMMANDS:
        sys.exit(f"hf-unigd: there is no command {command!r}. The commands are {', '.join(COMMANDS)}.")
    # With a value, it is the argument of that name of transformers' TrainingArguments.
    places = [n for n, word in enumerate(rest) if word == "--debug" and (rest[n + 1 :] or ["--"])[0].startswith("--")]
    try:
        module = import_module(f".{command.replace('-', '_')}", __package__)
        module.main([word for n, word in enumerate(rest) if n not in places])
    except KeyboardInterrupt:
        print(f"\nhf-unigd {command}: interrupted.{AFTER_INTERRUPTION.get(command, '')}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if places:
            raise
        sys.exit(f"hf-unigd {command}: {one_line(error)}")
