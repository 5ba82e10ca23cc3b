"""Retrieval-augmented generation with one model: what it finds by its embeddings, it reads before it answers."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..modeling import UniGDProcessor
from .entries import Hit, Part
from .index import EmbeddingIndex


logger = logging.getLogger(__name__)

# Sugar, appendix G; the retrieved knowledge follows it, then the picture and the question.
INSTRUCTION = (
    "Please answer the questions based on the pictures. If the reference information is useful, please use it. "
    "Otherwise, please ignore the reference information. Reference information:"
)


@dataclass(frozen=True)
class Answer:
    """
    Attributes:
        text: What the model says.
        hits: The entries that were put into the prompt, best first.
    """

    text: str
    hits: list[Hit]


@torch.no_grad()
def answer_with_retrieval(
    model: PreTrainedModel,
    processor: UniGDProcessor,
    index: EmbeddingIndex,
    questions: Sequence[Any],
    k: int = 3,
    use_images: bool = False,
    max_new_tokens: int = 128,
    where: str | None = None,
    instruction: str | None = None,
    **generate_kwargs: Any,
) -> list[Answer]:
    """
    Answers questions with the entries of an index that are most similar to them (Sugar, section 4.3 and appendix G).

    The number of entries, the line that each of them takes and the pictures are ours: the paper names none of them.

    Args:
        model: A [`UniGDForConditionalGeneration`], which made the index.
        processor: Its processor.
        index: What is known.
        questions: Texts, images, or lists of both in any order. They are embedded and answered in one batch.
        k: How many entries to put into the prompt.
        use_images: Put the entries' pictures into the prompt too, each at its place. An entry without any text says
            nothing otherwise; it is left out, which the log says.
        max_new_tokens: Longest answer, in tokens.
        where: A filter of the entries, as in [`EmbeddingIndex.search`].
        instruction: The instruction that the questions are embedded with, by default the processor's `"query"`. It is
            no part of the prompt.
        generate_kwargs: For `generate`: `do_sample`, `temperature`, `num_beams`, ...

    Returns:
        An answer for each question.

    Raises:
        ValueError: another model made the index, `k` is out of range, the index has no pictures to use, or the prompt
            and the answer are longer than the model's context.
        SequenceError: a question is empty, or holds something that is neither text nor image.
    """
    if use_images and not index.description.store_images:
        raise ValueError("`use_images=True`, but the index was made without pictures (`store_images=False`).")
    found = index.search(model, processor, questions, k, where=where, instruction=instruction)
    prompts, used = zip(*make_prompts(processor, questions, found, use_images), strict=True)
    batch = processor.process_sequences(list(prompts), prompted=False, padding_side="left")
    lengths, longest = batch["attention_mask"].sum(1), model.config.context_length
    if longest is not None and lengths.max() + max_new_tokens > longest:
        place = int(lengths.argmax())
        raise ValueError(
            f"Question {place} and the {len(used[place])} entries found for it take {int(lengths[place])} tokens; "
            f"with `max_new_tokens={max_new_tokens}` that is more than the model's context of {longest}. Lower "
            f"`k={k}`" + (" or leave the pictures out." if use_images else ".")
        )
    batch = batch.to(model.device, model.dtype)
    generated = model.eval().generate(**batch, max_new_tokens=max_new_tokens, **generate_kwargs)
    texts = processor.batch_decode(generated[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [Answer(text.strip(), hits) for text, hits in zip(texts, used, strict=True)]


def make_prompts(
    processor: UniGDProcessor, questions: Sequence[Any], found: Sequence[list[Hit]], use_images: bool = False
) -> list[tuple[list[Part], list[Hit]]]:
    """
    The prompt of each question, and the entries that are in it.

    Args:
        processor: The model's processor.
        questions: Texts, images, or lists of both.
        found: What was found for each. Entries that cannot be put into a prompt are left out, which the log says.
        use_images: Whether their images are put into the prompts.
    """
    marks = turn_marks(processor)
    used = [_usable(hits, use_images, processor) for hits in found]
    prompts = [make_prompt(question, hits, use_images, marks) for question, hits in zip(questions, used, strict=True)]
    return list(zip(prompts, used, strict=True))


def turn_marks(processor: UniGDProcessor) -> list[str]:
    """
    What the model's chat template writes between turns as plain text, such as `"ASSISTANT:"`, longest first. Special
    tokens are not among them, because no text can hold them, and neither are names of roles without any sign, which
    mark a turn only beside a special token.
    """
    said = ["\ue000", "\ue001", "\ue002"]  # of private use, so that no template writes them
    roles = ("user", "assistant", "user")
    chat = [
        {"role": role, "content": [{"type": "text", "text": text}]} for role, text in zip(roles, said, strict=True)
    ]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    _, *between = re.split("|".join(said), text)  # what comes first may be a system's turn
    special = map(re.escape, processor.tokenizer.added_tokens_encoder)
    pieces = re.split("|".join([r"\s", *special]), "\n".join(between))
    marks = {piece for piece in pieces if len(piece) > 1 and not piece.isalnum()}
    return sorted(marks, key=len, reverse=True)


def make_prompt(question: Any, hits: Sequence[Hit], use_images: bool = False, marks: Sequence[str] = ()) -> list[Part]:
    """The instruction, the entries (one a line), and the question.

    Args:
        question: A text, an image, or a list of both.
        hits: What was found.
        use_images: Whether the images of `hits` are part of it.
        marks: What begins and ends turns ([`turn_marks`]). Where an entry says it, a space is put into it, so that
            the model does not take it for a turn.
    """
    lines = [[_one_line(part, marks) for part in _shown(hit, use_images)] for hit in hits]
    lines.append(list(question) if isinstance(question, (list, tuple)) else [question])
    parts: list[Part] = [INSTRUCTION]
    separator = " "
    for line in lines:
        for part in line:
            if isinstance(part, str) and isinstance(parts[-1], str):
                parts[-1] += separator + part
            else:
                parts.append(part)
            separator = " "
        separator = "\n"
    return parts


def _one_line(part: Part, marks: Sequence[str]) -> Part:
    if not isinstance(part, str):
        return part
    line = " ".join(part.split())  # splits at every line break that Unicode knows
    for mark in marks:
        line = line.replace(mark, f"{mark[:-1]} {mark[-1]}")
    return line


def _shown(hit: Hit, use_images: bool) -> list[Part]:
    if use_images:
        return hit.sequence + hit.answer
    return [part for part in (*hit.sequence_parts, *hit.answer_parts) if isinstance(part, str)]


def _usable(hits: list[Hit], use_images: bool, processor: UniGDProcessor) -> list[Hit]:
    """The hits that can be put into the prompt."""
    usable = []
    for hit in hits:
        reason = _unusable(hit, use_images, processor)
        if reason is None:
            usable.append(hit)
        else:
            logger.warning("Left out: the entry %s %s.", hit.id, reason)
    return usable


def _unusable(hit: Hit, use_images: bool, processor: UniGDProcessor) -> str | None:
    try:
        parts = _shown(hit, use_images)
    except ValueError as error:  # an image that cannot be decoded
        return str(error)
    if not parts:
        return "has no text; `use_images` puts its images into the prompt"
    texts = [part for part in parts if isinstance(part, str)]
    reserved = next(filter(None, map(processor.find_reserved, texts)), None)
    return None if reserved is None else f"has the reserved token {reserved!r} in a text"
