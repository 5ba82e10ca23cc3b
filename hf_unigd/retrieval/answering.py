"""Retrieval-augmented generation with one model: what it finds by its embeddings, it reads before it answers."""

import logging
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
        instruction: The instruction that the questions are embedded with, by default the processor's `"query"`. It is
            no part of the prompt.
        generate_kwargs: For `generate`: `do_sample`, `temperature`, `num_beams`, ...

    Returns:
        An answer for each question.

    Raises:
        ValueError: another model made the index, `k` is out of range, the index has no pictures to use, nothing that
            was found can be put into the prompt, or the prompt and the answer are longer than the model's context.
        SequenceError: a question is empty, or holds something that is neither text nor image.
    """
    if use_images and not index.description.store_images:
        raise ValueError("`use_images=True`, but the index was made without pictures (`store_images=False`).")
    found = index.search(model, processor, questions, k, instruction=instruction)
    used = [_usable(hits, use_images) for hits in found]
    prompts = [make_prompt(question, hits, use_images) for question, hits in zip(questions, used, strict=True)]
    batch = processor.process_sequences(prompts, prompted=False, padding_side="left")
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


def make_prompt(question: Any, hits: Sequence[Hit], use_images: bool = False) -> list[Part]:
    """The instruction, the entries (one a line), and the question.

    Args:
        question: A text, an image, or a list of both.
        hits: What was found.
        use_images: Whether the pictures of `hits` are part of it.
    """
    lines = [_shown(hit, use_images) for hit in hits]
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


def _shown(hit: Hit, use_images: bool) -> list[Part]:
    return [part for part in hit.sequence + hit.answer if use_images or isinstance(part, str)]


def _usable(hits: list[Hit], use_images: bool) -> list[Hit]:
    """The hits that have something to put into the prompt."""
    usable = [hit for hit in hits if _shown(hit, use_images)]
    if not usable:
        raise ValueError("None of the entries found has a text. Put their pictures into the prompt: `use_images`.")
    for hit in hits:
        if hit not in usable:
            logger.warning("Left out: the entry of row %d has no text.", hit.row)
    return usable
