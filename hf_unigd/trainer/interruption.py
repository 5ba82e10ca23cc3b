"""Saves a checkpoint on SIGTERM, and finds the last complete checkpoint of a run."""

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

from .output_folder import checkpoints_in


class SaveOnSigterm(TrainerCallback):
    """Ends a run on SIGTERM: finishes the step, saves a checkpoint and exits with status 143.

    Schedulers send SIGTERM before they take a machine away, to one process or to all, at different times. So the
    processes exchange after each step whether one of them has received it.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.previous: Any = None  # the signal handler before training
        self.received = False  # whether this process has received the signal
        self.agreed = False  # whether any process had, at the end of the last step

    def on_train_begin(self, args, state, control, **kwargs):
        if threading.current_thread() is threading.main_thread():  # the only one that may set handlers
            self.previous = signal.signal(signal.SIGTERM, self._receive)

    def restore(self) -> None:
        """Restores the signal handler that was set before training."""
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
            self.accelerator.wait_for_everyone()  # a launcher kills all processes once one has exited
            if state.is_world_process_zero:
                print(f"SIGTERM: saved checkpoint-{state.global_step} in {args.output_dir}.", file=sys.stderr)
            sys.exit(128 + signal.SIGTERM)


def last_whole_checkpoint(folder: str | Path, removes_others: bool = False) -> str | None:
    """
    Returns the last complete checkpoint of a run, or `None`. The trainer's state is written last, so a checkpoint with
    a readable one is complete.

    Args:
        folder: The output folder of the run.
        removes_others: Whether to remove the incomplete checkpoints after it, which the trainer would take for newer
            ones. Without a complete one, nothing is removed: no run may have written there.
    """
    incomplete: list[Path] = []
    for path in checkpoints_in(folder):
        if is_whole(path):
            if removes_others:
                for later in incomplete:
                    discard(later)
            return str(path)
        incomplete.append(path)
    return None


def is_whole(checkpoint: Path) -> bool:
    """Whether the checkpoint of a run is complete."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def discard(checkpoint: str | Path) -> None:
    """Removes the files of a checkpoint."""
    shutil.rmtree(checkpoint, ignore_errors=True)
