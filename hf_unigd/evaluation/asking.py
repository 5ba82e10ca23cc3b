"""Asks a model questions, on all processes that a launcher started."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, TypeAlias

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..bulk import process_state
from ..modeling.rendering_unigd import SequenceError
from .embedders import CannotMeasureError, Embedder, ModelEmbedder


# Answers a batch of questions, each a list of texts and images.
Answerer: TypeAlias = Callable[[list[list[Any]]], list[str]]

ANSWER_TOKENS = 16


def speaker(embedder: Embedder) -> ModelEmbedder:
    """
    The model, as one that generates.

    Raises:
        CannotMeasureError: it does not.
    """
    if not isinstance(embedder, ModelEmbedder):
        raise CannotMeasureError(f"{embedder.name} does not generate, and this benchmark asks questions.")
    return embedder


def ask(
    embedder: Embedder,
    questions: Sequence[Callable[[], list]],
    show_progress: bool,
    answer_tokens: int = ANSWER_TOKENS,
    answer: Answerer | None = None,
) -> list[str]:
    """
    The answers of a model to questions. Processes share them, and all receive all answers.

    Args:
        embedder: The model.
        questions: Each makes the texts and images of a question, when it is asked.
        show_progress: Whether the first process draws a progress bar.
        answer_tokens: Longest answer, in tokens.
        answer: How a batch is answered. By default, the model reads the question alone and says what is likeliest.

    Raises:
        CannotMeasureError: the model does not generate.
        ValueError: a question cannot be processed.
    """
    model = speaker(embedder)
    state = process_state()
    own = list(range(state.process_index, len(questions), state.num_processes))
    answers: dict[int, str] = {}
    hidden = not (show_progress and state.is_main_process)
    progress = tqdm(total=len(own), desc="Answering", unit="question", disable=hidden)
    for start in range(0, len(own), model.batch_size):
        numbers = own[start : start + model.batch_size]
        batch = [questions[number]() for number in numbers]
        try:
            said = answer_alone(model, batch, answer_tokens) if answer is None else answer(batch)
        except ValueError as error:
            raise ValueError(f"In the batch that begins with question {numbers[0]}: {error}") from error
        answers |= dict(zip(numbers, said, strict=True))
        progress.update(len(numbers))
    progress.close()
    found = dict(chain.from_iterable(each.items() for each in gather_object([answers])))
    return [found[number] for number in range(len(questions))]


@torch.no_grad()
def answer_alone(embedder: ModelEmbedder, questions: list[list[Any]], answer_tokens: int) -> list[str]:
    """
    The likeliest answers of a model to a batch of questions.

    Raises:
        SequenceError: a question cannot be processed, or is longer than the model's context.
    """
    model, processor = embedder.model, embedder.processor
    batch = processor.process_sequences(
        questions, prompted=False, padding_side="left", max_length=model.config.context_length
    ).to(model.device, model.dtype)
    generated = model.generate(**batch, max_new_tokens=answer_tokens, do_sample=False)
    return processor.batch_decode(generated[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def fits(embedder: ModelEmbedder, question: list[Any]) -> bool:
    """
    Whether a question is within the model's context.

    Raises:
        SequenceError: it cannot be processed at all.
    """
    embedder.processor.check_sequence(question, prompted=False)
    try:
        embedder.processor.check_sequence(question, prompted=False, max_length=embedder.model.config.context_length)
    except SequenceError:
        return False
    return True
