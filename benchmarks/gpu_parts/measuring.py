"""Seconds and memory of calls and of training steps."""

import statistics
import time

import torch
from models import SHAPES
from transformers import TrainerCallback


class Clock:
    """Seconds between `start` and `stop`, by CUDA's events on a GPU."""

    def start(self) -> None:
        if SHAPES["device"] == "cuda":
            torch.cuda.synchronize()
            self.first, self.last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.first.record()
        else:
            self.began = time.perf_counter()

    def stop(self) -> float:
        if SHAPES["device"] == "cpu":
            return time.perf_counter() - self.began
        self.last.record()
        torch.cuda.synchronize()
        return self.first.elapsed_time(self.last) / 1e3


class Turns(TrainerCallback):
    """Seconds and memory of each turn: a call, or a step of a trainer."""

    def __init__(self):
        self.clock, self.seconds, self.peaks, self.held = Clock(), [], [], []

    def on_step_begin(self, *args, **kwargs) -> None:
        if SHAPES["device"] == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.held.append(torch.cuda.memory_allocated())  # 0 without a GPU
        self.clock.start()

    def on_step_end(self, *args, **kwargs) -> None:
        self.seconds.append(self.clock.stop())
        self.peaks.append(torch.cuda.max_memory_allocated())

    def summary(self, warmup: int = 1) -> dict:
        return {
            "seconds": statistics.median(self.seconds[warmup:]),
            "all_seconds": self.seconds,  # the warm-up too
            "peak_bytes": max(self.peaks[warmup:]),
            "held_bytes": self.held[-1],
        }


def measure(call, repeats: int) -> dict:
    turns = Turns()
    for _ in range(1 + repeats):
        turns.on_step_begin()
        call()
        turns.on_step_end()
    return turns.summary()
