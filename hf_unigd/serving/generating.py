"""Generates the answers of a batch, token by token, beside other work."""

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import StoppingCriteria, StoppingCriteriaList

from .batching import Job
from .errors import ApiError
from .prepared import Preparer
from .randomness import Randomness
from .text_stream import StreamedText
from .turns import Turns


GENERATION = "generation"


@dataclass(frozen=True)
class Generated:
    """
    Attributes:
        text: What the model says, without special tokens.
        finish_reason: `"stop"` at the model's own end or a text to stop at, `"length"` at the longest answer.
        prompt_tokens, completion_tokens: How many there are; the model's own end is one.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(eq=False)
class GenerationJob(Job):
    """
    A sequence to answer.

    Attributes:
        settings: Items of keyword arguments for `generate`.
        max_new_tokens: The longest answer. None for the longest that the model's context has room for, up to the
            server's limit.
        seed: The answer is that of `generate` after `torch.manual_seed(seed)`.
        stops: Texts to stop at.
        on_text: Is called with each piece of the text, in the thread that generates.
    """

    settings: tuple[tuple[str, Any], ...] = ()
    max_new_tokens: int | None = None
    seed: int | None = None
    stops: tuple[str, ...] = ()
    on_text: Callable[[str], None] = lambda text: None

    def __post_init__(self) -> None:
        self._is_cancelled = threading.Event()

    @property
    def key(self) -> Hashable:
        alone = None if self.seed is None else id(self)  # what others draw would change what it draws
        return self.settings, alone

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self.result.cancel()
        self._is_cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        return self._is_cancelled.is_set()


class Generator:
    """
    Args:
        preparer: Makes the batches.
        turns: Says when the model may run.
        decoder: Decodes tokens, and is used for nothing else.
        max_new_tokens: The longest answer.
    """

    def __init__(self, preparer: Preparer, turns: Turns, decoder: Tokenizer, max_new_tokens: int):
        self.preparer = preparer
        self.turns = turns
        self.decoder = decoder
        self.max_new_tokens = max_new_tokens
        eos = preparer.model.generation_config.eos_token_id
        if (beams := preparer.model.generation_config.num_beams or 1) > 1:
            raise ValueError(
                f"The model's generation config asks for {beams} beams, which answers of a server cannot have. Set "
                "`num_beams` to 1 in its generation_config.json."
            )
        self.ends = frozenset(eos if isinstance(eos, list) else [eos])

    @torch.inference_mode()
    def run(self, jobs: list[GenerationJob]) -> None:
        """Answers jobs of the same key, and sets their results ([`Generated`])."""
        prepared = self.preparer.batch(jobs, padding_side="left")
        if prepared is None:
            return
        rows = [self._row(job, length) for job, length in zip(prepared.jobs, prepared.lengths, strict=True)]
        if all(row.is_done for row in rows):
            return
        model, inputs = self.preparer.model, prepared.inputs
        first = prepared.jobs[0]
        with self.turns.turn(GENERATION), Randomness(first.seed, model.device) as randomness:
            model.generate(
                **inputs.to(model.device, model.dtype),
                max_new_tokens=max(row.max_new_tokens for row in rows if not row.is_done),
                stopping_criteria=StoppingCriteriaList([_Steps(rows, self._give_way(randomness))]),
                **dict(first.settings),
            )
        for row in rows:
            row.end("length")  # if the model's generation config has ended it, by `max_time` for example

    def _give_way(self, randomness: "Randomness") -> Callable[[], None]:
        def give_way() -> None:
            with randomness.set_aside():
                self.turns.give_way(GENERATION)

        return give_way

    def _row(self, job: GenerationJob, length: int) -> "_Row":
        room = self.preparer.model.config.context_length
        left = None if room is None else room - length
        longest = job.max_new_tokens
        if longest is None:
            longest = self.max_new_tokens if left is None else min(self.max_new_tokens, left)
        row = _Row(job, longest, length, StreamedText(self.decoder, job.stops), self.ends)
        if left is not None and (longest > left or longest < 1):
            message = (
                f"The messages have {length} tokens; with `max_tokens={longest}` that is more than the model's "
                f"context of {room}. Shorten them, or lower `max_tokens`."
            )
            row.fail(ApiError(400, message, "messages", code="context_length_exceeded"))
        return row


class _Row:
    """One answer of a batch."""

    def __init__(self, job: GenerationJob, max_new_tokens: int, length: int, text: StreamedText, ends: frozenset[int]):
        self.job = job
        self.max_new_tokens = max_new_tokens
        self.is_done = False
        self._length = length
        self._text = text
        self._ends = ends
        self._pieces: list[str] = []
        self._count = 0

    def add(self, token: int) -> None:
        if self.is_done:
            return
        if self.job.is_cancelled:
            self.fail(ApiError(499, "The client has gone."))
            return
        self._count += 1
        self._give(self._text.add(token))
        if token in self._ends or self._text.has_stopped:
            self.end("stop")
        elif self._count >= self.max_new_tokens:
            self.end("length")

    def fail(self, error: ApiError) -> None:
        self.is_done = True
        self.job.result.set_exception(error)

    def end(self, reason: str) -> None:
        if self.is_done:
            return
        self.is_done = True
        self._give(self._text.end())
        self.job.result.set_result(Generated("".join(self._pieces), reason, self._length, self._count))

    def _give(self, text: str) -> None:
        if text:
            self._pieces.append(text)
            self.job.on_text(text)


class _Steps(StoppingCriteria):
    """Reads the tokens of each step of `generate`, says which rows are done, and gives way to others."""

    def __init__(self, rows: list[_Row], give_way: Callable[[], None]):
        self._rows = rows
        self._give_way = give_way

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        for row, token in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
            row.add(token)
        done = [row.is_done for row in self._rows]
        if not all(done):
            self._give_way()
        return torch.tensor(done, device=input_ids.device)
