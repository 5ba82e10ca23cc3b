"""One model in memory, and the threads that batch, prepare and run what is asked of it."""

import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from ..modeling import UniGDForConditionalGeneration, UniGDProcessor
from ..modeling.probe_unigd import probe_sequences
from .batching import AnyJob, Waiting
from .embedding import EMBEDDING, EmbeddingJob, embed_batch
from .errors import as_api_error
from .generating import GenerationJob, Generator
from .limits import Limits
from .metrics import Metrics
from .prepared import Preparer
from .turns import Turns


# While one batch runs, the next is prepared.
_EMBEDDING_THREADS = 2
# A new chat waits for a place among these batches, which run step by step in turns.
_GENERATION_THREADS = 4


class Engine:
    """
    Args:
        model: The model, which nobody else may use meanwhile.
        processor: Its processor.
        limits: What a client may ask for.
        metrics: What is counted.

    Attributes:
        preparer: Checks sequences.
        sizes: What the vectors may be shortened to.
    """

    def __init__(
        self, model: UniGDForConditionalGeneration, processor: UniGDProcessor, limits: Limits, metrics: Metrics
    ):
        self.limits = limits
        self.metrics = metrics
        self.preparer = Preparer(model.eval(), processor, limits.max_tokens)
        self.sizes = model.config.matryoshka_dims or [model.config.embedding_dim]
        self._turns = Turns()
        decoder = copy.deepcopy(processor.tokenizer.backend_tokenizer)
        self._generator = Generator(self.preparer, self._turns, decoder, limits.max_new_tokens)
        window = limits.batch_window_ms / 1000
        self._embeddings: Waiting[EmbeddingJob] = Waiting(limits.batch_size, window, spares_padding=True)
        self._generations: Waiting[GenerationJob] = Waiting(limits.batch_size, window)
        metrics.watch("embedding", self._embeddings)
        metrics.watch("generation", self._generations)
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Warms the model up, and begins to take jobs."""
        self._warm_up()
        self._begin("embedding", _EMBEDDING_THREADS, self._embeddings, self._embed)
        self._begin("generation", _GENERATION_THREADS, self._generations, self._generator.run)

    def embed(self, job: EmbeddingJob) -> Future:
        """The job's result, an [`~hf_unigd.serving.embedding.Embedded`]."""
        self._embeddings.put(job)
        return job.result

    def generate(self, job: GenerationJob) -> Future:
        """The job's result, a [`~hf_unigd.serving.generating.Generated`]."""
        self._generations.put(job)
        return job.result

    @contextmanager
    def alone(self) -> Iterator[tuple[UniGDForConditionalGeneration, UniGDProcessor]]:
        """The model and its processor in a turn of their own, for what is done in no batch."""
        with self._turns.turn(EMBEDDING), self.preparer.in_use:
            yield self.preparer.model, self.preparer.processor

    def refuse(self) -> None:
        """Refuses what waits and what comes; what runs goes on."""
        self._embeddings.close()
        self._generations.close()

    def stop(self) -> None:
        """Refuses what waits, and finishes what runs."""
        self.refuse()
        for thread in self._threads:
            thread.join()

    def _embed(self, jobs: list[EmbeddingJob]) -> None:
        embed_batch(self.preparer, self._turns, jobs)

    def _warm_up(self) -> None:
        """Runs the model once in every way."""
        for sequence in probe_sequences():
            embedding, generation = EmbeddingJob(sequence, 0), GenerationJob(sequence, 0, max_new_tokens=2)
            self._embed([embedding])
            self._generator.run([generation])
            embedding.result.result()
            generation.result.result()

    def _begin(self, kind: str, count: int, waiting: Waiting[AnyJob], run: Callable[[list[AnyJob]], None]) -> None:
        for number in range(count):
            thread = threading.Thread(target=self._work, args=(kind, waiting, run), name=f"{kind}-{number}")
            thread.daemon = True  # a second interruption ends the process
            thread.start()
            self._threads.append(thread)

    def _work(self, kind: str, waiting: Waiting[AnyJob], run: Callable[[list[AnyJob]], None]) -> None:
        while jobs := waiting.take():
            self.metrics.batch_sizes.labels(kind).observe(len(jobs))
            try:
                run(jobs)
            except BaseException as error:
                told = as_api_error(error)
                for job in jobs:
                    if not job.result.done():
                        job.result.set_exception(told)
