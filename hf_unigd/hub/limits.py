"""Limits of the time and memory that a piece of work may take."""

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def limited(seconds: float, gigabytes: int, message: str) -> Iterator[None]:
    """
    A context that ends with an error after some time, or when it asks for much memory. Signals interrupt only the main
    thread of a process, between two steps of Python; in another thread there is no limit of time. The limit of memory
    is that of the process, so other threads should not need more meanwhile.

    Args:
        seconds: How long it may take.
        gigabytes: How much memory it may ask for, beside what the process has already.
        message: The message of the error.

    Raises:
        TimeoutError: once the time is over.
        MemoryError, RuntimeError: whatever asked for the memory raises.
    """
    with _memory_limit(gigabytes):
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


@contextmanager
def _memory_limit(gigabytes: int) -> Iterator[None]:
    pages = Path("/proc/self/statm")
    if not pages.is_file():  # the size of a process is known on Linux alone
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(pages.read_text().split()[0]) * resource.getpagesize() + (gigabytes << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit if soft == resource.RLIM_INFINITY else min(limit, soft), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
