"""
Check a checkpoint: its tensors, prompts and probe, and which libraries can load it here. Exits with status 1 if
something is wrong with it.
"""

import sys
from dataclasses import dataclass, field

from ..hub.doctor import examine, report
from ..hub.findings import FAULT
from .parser import CommandParser


@dataclass
class DoctorArguments:
    model: str = field(metadata={"help": "Trained checkpoint or adapter: a Hub id or a folder."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the Hub repository."})
    token: str | None = field(default=None, metadata={"help": "Access token for a private Hub repository."})


def main(argv: list[str]) -> None:
    (args,) = CommandParser("doctor", DoctorArguments, description=__doc__).parse(argv)
    findings = examine(args.model, args.revision, args.token)
    print(report(findings))
    if any(finding.level == FAULT for finding in findings):
        sys.exit(1)
