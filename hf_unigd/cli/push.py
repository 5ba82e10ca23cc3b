"""Upload a saved checkpoint to the Hub in one commit, without what training left in its folder."""

from dataclasses import dataclass, field

from ..hub.pushing import push_checkpoint
from .parser import CommandParser


@dataclass
class PushArguments:
    folder: str = field(metadata={"help": "Folder of a saved checkpoint or adapter."})
    repo_id: str = field(metadata={"help": "Hub repository, as owner/name. It is created if it does not exist."})
    private: bool | None = field(default=None, metadata={"help": "Whether a new repository is private."})
    revision: str | None = field(
        default=None, metadata={"help": "Branch to commit to. It is created if it does not exist."}
    )
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request instead of committing."})
    token: str | None = field(default=None, metadata={"help": "Access token, by default the one you logged in with."})


def main(argv: list[str]) -> None:
    (args,) = CommandParser("push", PushArguments, description=__doc__).parse(argv)
    commit = push_checkpoint(args.folder, args.repo_id, args.private, args.revision, args.create_pr, args.token)
    print(commit.pr_url or commit.commit_url)
