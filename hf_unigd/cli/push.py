"""`hf-unigd push`: a saved checkpoint to the Hub, in one commit."""

from dataclasses import dataclass, field

from trl import TrlParser

from ..hub.pushing import push_checkpoint


@dataclass
class PushArguments:
    folder: str = field(metadata={"help": "Folder of a saved checkpoint, whole or an adapter."})
    repo_id: str = field(metadata={"help": "Where to, as owner/name; created where it does not exist."})
    private: bool | None = field(default=None, metadata={"help": "Whether a new repository is private."})
    revision: str | None = field(default=None, metadata={"help": "Branch to commit to."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request instead."})
    token: str | None = field(default=None, metadata={"help": "Of the Hub; the one logged in with by default."})


def main(argv: list[str]) -> None:
    # The two things that it needs may be given without their names.
    for place, name in enumerate(("--folder", "--repo_id")):
        if len(argv) > 2 * place and not argv[2 * place].startswith("-"):
            argv = [*argv[: 2 * place], name, *argv[2 * place :]]
    (args,) = TrlParser((PushArguments,), prog="hf-unigd push").parse_args_and_config(argv)
    commit = push_checkpoint(args.folder, args.repo_id, args.private, args.revision, args.create_pr, args.token)
    print(commit.pr_url or commit.commit_url)
