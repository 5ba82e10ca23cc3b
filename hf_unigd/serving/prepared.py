"""Makes batches of jobs beside the model."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic

from transformers import BatchFeature

from ..data.lengths import sequence_length
from ..modeling import SequenceError, UniGDForConditionalGeneration, UniGDProcessor
from .batching import AnyJob
from .errors import ApiError


@dataclass(frozen=True)
class Prepared(Generic[AnyJob]):
    """
    Attributes:
        jobs: The jobs that could be processed.
        inputs: Their batch, on the CPU.
        lengths: The number of tokens of each.
    """

    jobs: list[AnyJob]
    inputs: BatchFeature
    lengths: list[int]


class Preparer:
    """
    The model with its processor, which one thread at a time may use: tokenizers and the processors of images keep
    settings between calls.

    Args:
        model: The model.
        processor: Its processor.
        max_tokens: The longest sequence.

    Attributes:
        in_use: Is held by the thread that uses the processor.
    """

    def __init__(self, model: UniGDForConditionalGeneration, processor: UniGDProcessor, max_tokens: int | None = None):
        limits = [limit for limit in (max_tokens, model.config.context_length) if limit is not None]
        self.model = model
        self.processor = processor
        self.max_tokens = min(limits, default=None)
        self.in_use = threading.Lock()

    def check(self, sequences: Sequence[Any], param: str, prompted: bool) -> list[int]:
        """
        Checks that sequences can be processed, before they take places in batches.

        Args:
            sequences: What [`UniGDProcessor.process_sequences`] takes.
            param: How the request calls them.
            prompted: Whether they are to be embedded.

        Returns:
            About how many tokens each has.

        Raises:
            ApiError: one cannot.
        """
        lengths = []
        for place, sequence in enumerate(sequences):
            try:
                with self.in_use:
                    self.processor.check_sequence(sequence, prompted=prompted, max_length=self.max_tokens)
                    lengths.append(sequence_length(self.processor, sequence))
            except SequenceError as error:
                raise _refused(error, param if len(sequences) == 1 else f"{param}[{place}]") from error
        return lengths

    def batch(
        self,
        jobs: list[AnyJob],
        *,
        instructions: Sequence[str | None] | None = None,
        padding_side: str | None = None,
    ) -> Prepared[AnyJob] | None:
        """
        The batch of jobs, without those that cannot be processed, which are told so; None if there are no others.

        Args:
            jobs: Jobs.
            instructions: What each is embedded for. None if they are not embedded.
            padding_side: As in [`UniGDProcessor.process_sequences`].
        """
        jobs, texts = list(jobs), list(instructions or [])
        while jobs:
            try:
                with self.in_use:
                    inputs = self.processor.process_sequences(
                        [job.sequence for job in jobs],
                        prompted=instructions is not None,
                        instruction=texts if instructions is not None else None,
                        max_length=self.max_tokens,
                        padding_side=padding_side,
                    )
                return Prepared(jobs, inputs, inputs["attention_mask"].sum(1).tolist())
            except SequenceError as error:  # what a check of its size and texts cannot see
                jobs.pop(error.index).result.set_exception(_refused(error))
                texts[error.index : error.index + 1] = []
        return None


def _refused(error: SequenceError, param: str | None = None) -> ApiError:
    message = f"`{param}` {error.reason}" if param else f"An input {error.reason}"
    too_long = "more than `max_length" in error.reason
    return ApiError(400, message, param, code="context_length_exceeded" if too_long else None)
