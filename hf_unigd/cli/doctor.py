"""
Check a checkpoint: its tensors, prompts and probe, and which libraries can load it here. With `--url`, check whether
the vectors of a server are the checkpoint's. Exits with status 1 if something is wrong.
"""

import sys
from dataclasses import dataclass, field

from ..hub.doctor import examine, report
from ..hub.doctor_endpoint import examine_endpoint
from ..hub.findings import FAULT
from .parser import CommandParser


@dataclass
class DoctorArguments:
    model: str = field(metadata={"help": "Trained checkpoint or adapter: a Hub id or a folder."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the Hub repository."})
    token: str | None = field(default=None, metadata={"help": "Access token for a private Hub repository."})
    url: str | None = field(
        default=None,
        metadata={
            "help": "Where a server speaks OpenAI's API: `http://localhost:8000/v1`. It gets the probe's inputs, and "
            "its vectors are compared; the environment variable OPENAI_API_KEY may hold its key."
        },
    )
    name: str | None = field(
        default=None, metadata={"help": "Name of the model at `--url`, instead of the first that is listed there."}
    )

    def __post_init__(self):
        if self.name is not None and self.url is None:
            raise ValueError("`--name` is the name of a model at a server: give its `--url`.")


def main(argv: list[str]) -> None:
    (args,) = CommandParser("doctor", DoctorArguments, description=__doc__).parse(argv)
    if args.url is None:
        findings = examine(args.model, args.revision, args.token)
    else:
        findings = examine_endpoint(args.model, args.url, args.name, args.revision, args.token)
    print(report(findings))
    if any(finding.level == FAULT for finding in findings):
        sys.exit(1)
