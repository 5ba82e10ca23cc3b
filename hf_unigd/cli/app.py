"""
Write a folder that runs as a Space of the Hub: a page and a server of a model and, with an index, of what it knows.
The model is loaded once before, and the index compared with it. `--push true` uploads the folder.
"""

import shlex
from dataclasses import dataclass, field

from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..hub import load_checkpoint
from ..hub.pushing import push_space
from ..outputs import NewFolder
from ..retrieval import EmbeddingIndex
from ..serving.space import write_space
from .parser import CommandParser


@dataclass
class AppArguments:
    space: str = field(metadata={"help": "Space of the Hub, as owner/name."})
    model: str = field(
        metadata={"help": "Trained checkpoint or adapter: a Hub id, which the Space downloads, or a folder, to copy."}
    )
    index: str | None = field(
        default=None,
        metadata={"help": "Folder, to copy, or address that `hf-unigd index` wrote to, to search and answer from."},
    )
    name: str | None = field(
        default=None,
        metadata={"help": "Name of the model there, instead of its Hub id, or of the Space's name for a folder."},
    )
    output: NewFolder = field(default="space", metadata={"help": "New or empty folder to write."})
    push: bool = field(
        default=False, metadata={"help": "Upload the folder in one commit. What the Space held before is replaced."}
    )
    private: bool | None = field(default=None, metadata={"help": "With `--push`: whether a new Space is private."})
    token: str | None = field(
        default=None, metadata={"help": "With `--push`: access token, by default the one you logged in with."}
    )

    def __post_init__(self):
        try:
            validate_repo_id(self.space)
        except HFValidationError as error:
            raise ValueError(f"`--space`: {error}") from error
        if "/" not in self.space:
            raise ValueError(f"`--space {self.space}` lacks its owner: owner/name.")
        if not self.push and (self.private is not None or self.token is not None):
            raise ValueError("`--private` and `--token` are for `--push true`, without which nothing is uploaded.")


def main(argv: list[str]) -> None:
    (args,) = CommandParser("app", AppArguments, description=__doc__).parse(argv)
    index = None if args.index is None else EmbeddingIndex.load(args.index)
    model, processor = load_checkpoint(args.model)
    if index is not None:
        index.check_model(model, processor)
    write_space(args.output, args.space, args.model, args.index, args.name)
    if args.push:
        print(push_space(args.output, args.space, args.private, args.token).commit_url)
        return
    upload = shlex.join(["hf", "upload", args.space, args.output, "--repo-type", "space"])
    print(f"{args.output} is a Space of {args.model}. Upload it: {upload}")
