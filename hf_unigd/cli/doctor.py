"""`hf-unigd doctor`: what is wrong with a checkpoint, and which of its consumers will work here."""

import sys
from dataclasses import dataclass, field

from trl import TrlParser

from ..hub.doctor import FAULT, examine, report


@dataclass
class DoctorArguments:
    model: str = field(metadata={"help": "A trained checkpoint: a Hub id or a folder."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub id."})
    token: str | None = field(default=None, metadata={"help": "For a private repository."})


def main(argv: list[str]) -> None:
    # The one thing that it takes may be given without its name.
    argv = ["--model", *argv] if argv and not argv[0].startswith("-") else argv
    (args,) = TrlParser((DoctorArguments,), prog="hf-unigd doctor").parse_args_and_config(argv)
    findings = examine(args.model, args.revision, args.token)
    print(report(findings))
    if any(finding.level == FAULT for finding in findings):
        sys.exit(1)
