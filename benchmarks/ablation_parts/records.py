"""The files that keep what was measured: one for an arm and a seed, and one for how an arm was tuned."""

import hashlib
import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from hf_unigd.outputs import writing


RESULTS = Path(__file__).parents[1] / "results" / "evidence"


def result_file(arm: str, seed: int) -> Path:
    return RESULTS / f"{arm}-{seed}.json"


def tuning_file(arm: str) -> Path:
    return RESULTS / f"tuning-{arm}.json"


def read(file: Path) -> dict[str, Any]:
    """What a file holds, or nothing if it does not exist."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def write(file: Path, record: dict[str, Any]) -> None:
    """Writes a record together with what it was measured with."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**record, **circumstances()}, indent=1)
    with writing(file) as unfinished:
        unfinished.write_text(f"{text}\n", encoding="utf-8")


def circumstances() -> dict[str, Any]:
    """The commit, the machine and the versions. A commit with changes that were not committed ends with "+"."""
    changed = _git("status", "--porcelain", "--", ":/hf_unigd", ":/benchmarks/*.py")
    return {
        "commit": _git("rev-parse", "HEAD") + "+" * bool(changed),
        "hardware": {"cpu": _cpu(), "threads": torch.get_num_threads()},
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "sentence-transformers")},
    }


def digest(file: Path) -> str:
    """The first digits of the SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:12]


def _git(*arguments: str) -> str:
    run = subprocess.run(("git", *arguments), cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    return run.stdout.strip()


def _cpu() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
