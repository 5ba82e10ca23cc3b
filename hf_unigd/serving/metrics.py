"""What the server counts, for Prometheus."""

from collections.abc import Sized

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = kept = CollectorRegistry()
        self.requests = Counter("hf_unigd_requests", "Requests that were answered", ["path", "status"], registry=kept)
        self.seconds = Histogram(
            "hf_unigd_request_seconds", "Seconds until the end of an answer", ["path"], buckets=_SECONDS, registry=kept
        )
        self.in_work = Gauge("hf_unigd_requests_in_work", "Requests that run or wait", registry=kept)
        self.waiting = Gauge("hf_unigd_waiting_jobs", "Sequences that wait for a batch", ["kind"], registry=kept)
        self.batch_sizes = Histogram(
            "hf_unigd_batch_size", "Sequences of a batch", ["kind"], buckets=_SIZES, registry=kept
        )
        self.tokens = Counter("hf_unigd_tokens", "Tokens that were read and generated", ["kind"], registry=kept)

    def watch(self, kind: str, waiting: Sized) -> None:
        """Reports how many jobs of a kind wait."""
        self.waiting.labels(kind).set_function(lambda: len(waiting))

    def text(self) -> bytes:
        """The metrics in Prometheus' format of text."""
        return generate_latest(self._registry)
