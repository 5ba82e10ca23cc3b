"""Jobs that arrive together become batches."""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from .errors import ApiError


# A few tokens more make no batch slower, as the prompt is added to all.
_SLACK = 32


@dataclass(eq=False)
class Job(ABC):
    """
    Attributes:
        sequence: What [`UniGDProcessor.process_sequences`] takes.
        length: About how many tokens it has.
        result: What comes of it. A job that is cancelled before it begins is dropped.
    """

    sequence: Any
    length: int
    result: Future = field(default_factory=Future, init=False)

    @property
    @abstractmethod
    def key(self) -> Hashable:
        """Jobs of the same key may share a batch."""


AnyJob = TypeVar("AnyJob", bound=Job)


class Waiting(Generic[AnyJob]):
    """
    Jobs that wait for a batch.

    Args:
        batch_size: Jobs of a batch, at most.
        window: How long the first job waits for others, in seconds.
        spares_padding: Whether jobs that are much longer or shorter than the oldest wait for another batch.
    """

    def __init__(self, batch_size: int, window: float, spares_padding: bool = False):
        self.batch_size = batch_size
        self.window = window
        self.spares_padding = spares_padding
        self._changed = threading.Condition()
        self._jobs: list[tuple[float, AnyJob]] = []  # with when they arrived, the oldest first
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._jobs)

    def put(self, job: AnyJob) -> None:
        """
        Raises:
            ApiError: no more jobs are taken.
        """
        with self._changed:
            if self._is_closed:
                raise closing()
            self._jobs.append((time.monotonic(), job))
            self._changed.notify_all()

    def take(self) -> list[AnyJob]:
        """Waits for jobs, and returns those of a batch, which are marked as running: the oldest, and those of its key
        whose lengths are nearest to its own. An empty list once no more jobs are taken."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._jobs or self._is_closed)
                if self._is_closed:
                    return []
                left = self._jobs[0][0] + self.window - time.monotonic()
                if left > 0 and len(self._jobs) < self.batch_size:
                    self._changed.wait(left)
                    continue
                if batch := [job for job in self._remove_batch() if job.result.set_running_or_notify_cancel()]:
                    return batch

    def close(self) -> None:
        """Refuses the jobs that wait, and all others."""
        with self._changed:
            self._is_closed = True
            refused, self._jobs = self._jobs, []
            self._changed.notify_all()
        for _, job in refused:
            if job.result.set_running_or_notify_cancel():
                job.result.set_exception(closing())

    def _remove_batch(self) -> list[AnyJob]:
        _, oldest = self._jobs[0]
        alike = sorted((job for _, job in self._jobs if self._are_alike(job, oldest)), key=lambda job: job.length)
        first = alike.index(oldest) - self.batch_size // 2
        first = max(0, min(first, len(alike) - self.batch_size))
        batch = alike[first : first + self.batch_size]
        self._jobs = [(arrived, job) for arrived, job in self._jobs if job not in batch]
        return batch

    def _are_alike(self, job: AnyJob, oldest: AnyJob) -> bool:
        if job.key != oldest.key:
            return False
        shorter, longer = sorted((job.length, oldest.length))
        return not self.spares_padding or longer <= 2 * shorter + _SLACK


def closing() -> ApiError:
    return ApiError(503, "The server is shutting down.", kind="server_error", headers={"Retry-After": "5"})
