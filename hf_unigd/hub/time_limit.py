"""A limit of the time that a piece of work may take."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def time_limit(seconds: float, message: str) -> Iterator[None]:
    """
    A context that ends with an error after some time. Only the main thread of a process can be interrupted; in
    another thread there is no limit.

    Raises:
        TimeoutError: with `message`, once the time is over.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum, frame):
        raise TimeoutError(message)

    handler = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)
