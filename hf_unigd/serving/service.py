"""What the routes have in common: the model, by its name, as coroutines."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from .contents import ContentReader
from .embedding import Embedded, EmbeddingJob
from .engine import Engine
from .errors import ApiError
from .generating import Generated, GenerationJob
from .requests import Sampling


class Service:
    """
    Args:
        engine: Runs the model.
        name: The name that clients call it.
    """

    def __init__(self, engine: Engine, name: str):
        self.engine = engine
        self.name = name
        self.reader = ContentReader(engine.limits)

    def check_model(self, name: str | None) -> None:
        """
        Raises:
            ApiError: a request asks for another model.
        """
        if name not in (None, self.name):
            raise ApiError(
                404, f"There is no model {name!r} here; it is {self.name!r}.", "model", code="model_not_found"
            )

    def instruction(self, prompt_name: str) -> str | None:
        """
        The processor's instruction of a name.

        Raises:
            ApiError: there is none.
        """
        try:
            return self.engine.preparer.processor.get_instruction(prompt_name)
        except ValueError as error:
            raise ApiError(400, str(error), "prompt_name") from error

    async def check(self, sequence: Any, param: str) -> None:
        """
        Checks that a sequence can be embedded.

        Args:
            sequence: What [`UniGDProcessor.process_sequences`] takes.
            param: How the request calls it.

        Raises:
            ApiError: it cannot.
        """
        await asyncio.to_thread(self.engine.preparer.check, [sequence], param, True)

    async def embed(
        self, sequences: Sequence[Any], param: str, instruction: str | None = None, dimensions: int | None = None
    ) -> list[Embedded]:
        """
        Embeds sequences, in batches with those of other requests.

        Args:
            sequences: What [`UniGDProcessor.process_sequences`] takes.
            param: How the request calls them.
            instruction: What they are embedded for.
            dimensions: The size of the Matryoshka prefix.

        Raises:
            ApiError: a sequence cannot be processed, or the model was not trained for the size.
        """
        sizes = self.engine.sizes
        if dimensions is not None and dimensions not in sizes:
            raise ApiError(400, f"`dimensions={dimensions}` was not trained. Choose one of {sizes}.", "dimensions")
        lengths = await asyncio.to_thread(self.engine.preparer.check, sequences, param, True)
        jobs = [
            EmbeddingJob(sequence, length, instruction, dimensions)
            for sequence, length in zip(sequences, lengths, strict=True)
        ]
        # A long request leaves places in the next batches to others.
        places = asyncio.Semaphore(2 * self.engine.limits.batch_size)

        async def run(job: EmbeddingJob) -> Embedded:
            async with places:
                return await asyncio.wrap_future(self.engine.embed(job))

        order = sorted(range(len(jobs)), key=lambda place: jobs[place].length)
        tasks = [asyncio.ensure_future(run(jobs[place])) for place in order]
        try:
            by_length = dict(zip(order, await asyncio.gather(*tasks), strict=True))
        finally:
            for task in tasks:
                task.cancel()
        embedded = [by_length[place] for place in range(len(jobs))]
        self.engine.metrics.tokens.labels("embedded").inc(sum(each.tokens for each in embedded))
        return embedded

    async def generate(self, sequence: Any, param: str, sampling: Sampling) -> AsyncIterator[str | Generated]:
        """
        Yields the pieces of an answer, and at last what it is as a whole.

        Args:
            sequence: What [`UniGDProcessor.process_sequences`] takes.
            param: How the request calls it.
            sampling: How to generate.

        Raises:
            ApiError: the sequence cannot be processed, or the answer has no room in the model's context.
        """
        longest, most = sampling.longest, self.engine.limits.max_new_tokens
        if longest is not None and longest > most:
            raise ApiError(
                400, f"`max_tokens={longest}` is more than this server's {most} (`--max_new_tokens`).", "max_tokens"
            )
        (length,) = await asyncio.to_thread(self.engine.preparer.check, [sequence], param, False)
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(piece: str | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        job = GenerationJob(
            sequence,
            length,
            sampling.generate_kwargs(),
            max_new_tokens=longest,
            seed=sampling.seed,
            stops=sampling.stops,
            on_text=tell,
        )
        result = self.engine.generate(job)
        result.add_done_callback(lambda _: tell(None))
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            generated = result.result()
        finally:
            job.cancel()
        self.engine.metrics.tokens.labels("prompt").inc(generated.prompt_tokens)
        self.engine.metrics.tokens.labels("generated").inc(generated.completion_tokens)
        yield generated

    async def generate_whole(self, sequence: Any, param: str, sampling: Sampling) -> Generated:
        """
        As [`generate`], at once.

        Raises:
            ApiError: as [`generate`] does.
        """
        async for piece in self.generate(sequence, param, sampling):
            if isinstance(piece, Generated):
                return piece
        raise AssertionError("`generate` ends with what it has generated")
