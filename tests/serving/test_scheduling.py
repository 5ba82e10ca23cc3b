"""Which jobs become a batch, and whose turn it is."""

import threading
import time
from dataclasses import dataclass

import pytest

from hf_unigd.serving.batching import Job, Waiting
from hf_unigd.serving.errors import ApiError
from hf_unigd.serving.turns import Turns


@dataclass(eq=False)
class Sized(Job):
    kind: str = ""

    @property
    def key(self):
        return self.kind


def waiting(lengths, batch_size=3, window=0.0):
    queue = Waiting(batch_size, window)
    for length in lengths:
        queue.put(Sized(None, length))
    return queue


def lengths_of(batch):
    return [job.length for job in batch]


def test_the_oldest_job_runs_with_those_of_about_its_length():
    queue = waiting([50, 1, 100, 48, 2, 52, 3])
    assert lengths_of(queue.take()) == [48, 50, 52]
    assert lengths_of(queue.take()) == [1, 2, 3]
    assert lengths_of(queue.take()) == [100]


def test_padding_is_spared_where_it_costs_most():
    lengths = [200, 10, 390, 50, 100, 30, 500]
    queue = Waiting(8, 0.0, spares_padding=True)
    for length in lengths:
        queue.put(Sized(None, length))
    assert lengths_of(queue.take()) == [100, 200, 390]
    assert lengths_of(queue.take()) == [10, 30, 50]
    assert lengths_of(queue.take()) == [500]


def test_jobs_of_another_key_run_in_another_batch():
    queue = Waiting(4, 0.0)
    for place in range(6):
        queue.put(Sized(None, place, kind="ab"[place % 2]))
    assert lengths_of(queue.take()) == [0, 2, 4]
    assert lengths_of(queue.take()) == [1, 3, 5]


def test_the_first_job_waits_for_others_as_long_as_the_window():
    queue = waiting([1], window=0.3)
    threading.Timer(0.1, queue.put, [Sized(None, 2)]).start()
    started = time.monotonic()
    assert lengths_of(queue.take()) == [1, 2]
    assert 0.2 < time.monotonic() - started < 5


def test_a_full_batch_waits_for_nobody():
    queue = waiting([1, 2, 3], window=60)
    assert lengths_of(queue.take()) == [1, 2, 3]


def test_cancelled_jobs_are_dropped():
    queue = Waiting(2, 0.0)
    jobs = [Sized(None, place) for place in range(3)]
    for job in jobs:
        queue.put(job)
    assert jobs[0].result.cancel()
    assert queue.take() == [jobs[1]]
    assert not jobs[1].result.cancel()  # it runs


def test_a_closed_queue_refuses_what_waits_and_what_comes():
    queue = waiting([1], window=60)
    job = Sized(None, 2)
    queue.put(job)
    taken = []
    thread = threading.Thread(target=lambda: taken.append(queue.take()))
    thread.start()
    queue.close()
    thread.join(10)
    assert taken == [[]]
    with pytest.raises(ApiError, match="shutting down"):
        job.result.result(0)
    with pytest.raises(ApiError, match="shutting down"):
        queue.put(Sized(None, 3))


def run_beside(turns, seconds, works):
    """How often each work has run: a kind and the seconds of a step."""
    counts, threads, end = [0] * len(works), [], time.monotonic() + seconds

    def run(place, kind, step):
        while time.monotonic() < end:
            with turns.turn(kind):
                time.sleep(step)
            counts[place] += 1

    for place, (kind, step) in enumerate(works):
        threads.append(threading.Thread(target=run, args=(place, kind, step)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return counts


def test_kinds_get_the_same_time_whatever_a_step_takes_and_however_many_ask():
    counts = run_beside(Turns(), 2, [("long", 0.04), ("short", 0.01), ("short", 0.01), ("short", 0.01)])
    long, short = counts[0] * 0.04, sum(counts[1:]) * 0.01
    assert 0.6 < long / short < 1.6
    assert max(counts[1:]) - min(counts[1:]) <= 2  # within a kind, in the order of coming


def test_time_that_was_not_used_is_not_saved_up():
    turns = Turns()
    run_beside(turns, 0.5, [("a", 0.01)])
    a, b = run_beside(turns, 1, [("a", 0.01), ("b", 0.01)])
    assert 0.6 < a / b < 1.6


def test_long_work_gives_way_between_its_steps():
    turns, order = Turns(), []
    asked = threading.Event()

    def ask():
        asked.set()
        with turns.turn("b"):
            order.append("b")

    with turns.turn("a"):
        order.append("a")
        turns.give_way("a")  # nobody waits
        thread = threading.Thread(target=ask)
        thread.start()
        asked.wait()
        time.sleep(0.1)
        order.append("a")
        turns.give_way("a")
        order.append("a")
    thread.join()
    assert order == ["a", "a", "b", "a"]
