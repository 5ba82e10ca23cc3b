"""Whose turn it is to run the model."""

import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """
    Lets one thread at a time run the model. Kinds of work that wait at the same time get the same share of its time
    (start-time fair queueing: Goyal et al., SIGCOMM 1996); within a kind, who comes first is served first.

    A turn is never taken away: long work gives way between its steps.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: dict[str, deque[object]] = defaultdict(deque)
        self._used: dict[str, float] = defaultdict(float)  # virtual time, in seconds
        self._holder: str | None = None
        self._clock = 0.0
        self._started = 0.0

    @contextmanager
    def turn(self, kind: str) -> Iterator[None]:
        """A context that begins when it is this work's turn."""
        self._begin(kind)
        try:
            yield
        finally:
            self._end()

    def give_way(self, kind: str) -> None:
        """Between two steps of a turn: lets others go first whose turn it is."""
        with self._changed:
            if not any(self._waiting.values()):
                self._settle()
                return
        self._end()
        self._begin(kind)

    def _begin(self, kind: str) -> None:
        ticket = object()
        with self._changed:
            if not self._waiting[kind] and self._holder != kind:
                self._used[kind] = max(self._used[kind], self._clock)  # what was not used before is not saved up
            self._waiting[kind].append(ticket)
            self._changed.wait_for(lambda: self._holder is None and self._next() is ticket)
            self._waiting[kind].popleft()
            self._holder = kind
            self._clock, self._started = self._used[kind], time.perf_counter()

    def _end(self) -> None:
        with self._changed:
            self._settle()
            self._holder = None
            self._changed.notify_all()

    def _settle(self) -> None:
        """Counts the time that the holder has used."""
        assert self._holder is not None
        now = time.perf_counter()
        self._used[self._holder] += now - self._started
        self._clock, self._started = self._used[self._holder], now

    def _next(self) -> object:
        """The ticket whose turn it is."""
        kind = min((kind for kind, tickets in self._waiting.items() if tickets), key=self._used.__getitem__)
        return self._waiting[kind][0]
