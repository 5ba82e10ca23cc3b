"""Stopping early without losing anything: SIGTERM, and checkpoints that are whole or not there."""

import json
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback


class SaveOnSigterm(TrainerCallback):
    """Ends a run that is told to terminate: the step is finished, a checkpoint saved, and the exit status is 143.

    Schedulers send SIGTERM before they take a machine away, to one process or to all, not all at once; so processes
    agree on it after each step.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.previous: Any = None  # handler
        self.received = False  # by this process
        self.agreed = False  # by all of them, at the end of a step

    def on_train_begin(self, args, state, control, **kwargs):
        if threading.current_thread() is threading.main_thread():  # Python allows it there alone
            self.previous = signal.signal(signal.SIGTERM, self._receive)

    def restore(self) -> None:
        """Gives the signal back to whoever had it before training."""
        if self.previous is not None:
            signal.signal(signal.SIGTERM, self.previous)
            self.previous = None

    def _receive(self, signum, frame):
        self.received = True

    def on_step_end(self, args, state, control, **kwargs):
        received = torch.tensor(int(self.received), device=args.device)
        self.agreed = bool(self.accelerator.reduce(received, reduction="sum"))
        control.should_save |= self.agreed
        control.should_evaluate &= not self.agreed

    def on_save(self, args, state, control, **kwargs):
        if self.agreed:
            self.accelerator.wait_for_everyone()  # a launcher ends all processes when the first is gone
            if state.is_world_process_zero:
                print(f"SIGTERM: saved checkpoint-{state.global_step} in {args.output_dir}.", file=sys.stderr)
            sys.exit(128 + signal.SIGTERM)


def last_whole_checkpoint(folder: str | Path, removes_others: bool = False) -> str | None:
    """
    The last checkpoint of a folder that was written to its end, which is the trainer's state.

    Args:
        folder: The output folder of a run.
        removes_others: Remove what was begun after it, which the trainer would take for newer checkpoints.
    """
    for path in sorted(Path(folder).glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])):
        if _is_whole(path):
            return str(path)
        if removes_others:
            discard(path)
    return None


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def discard(checkpoint: str | Path) -> None:
    """Removes what was written of a checkpoint."""
    shutil.rmtree(checkpoint, ignore_errors=True)
