"""Protocols that ask a model questions."""

import random
import re
from functools import partial
from typing import Any

import numpy as np
import torch

from ..retrieval import answer_with_retrieval
from .answer_measures import MEASURES, yes_or_no
from .asking import ANSWER_TOKENS, answer_alone, ask, fits, speaker
from .benchmark_data import BenchmarkData
from .categories import by_category
from .embedders import Embedder
from .knowledge import knowledge_index, question_parts
from .scores import Outcome, Scores


def yes_no(embedder: Embedder, data: BenchmarkData, show_progress: bool = False) -> Outcome:
    """
    POPE: whether a model that is asked answers "yes" or "no" as it should, by category; what is neither is wrong. Rows
    have `image`, `question` and `answer`, and may have `category`.

    Raises:
        CannotMeasureError: the model does not generate.
    """
    rows = list(range(len(data.rows)))

    def question(number: int) -> list:
        return [data.open(number, "image"), data.rows[number]["question"]]

    said = ask(embedder, [partial(question, number) for number in rows], show_progress)
    words = [yes_or_no(answer) for answer in said]
    right = [word == data.rows[n]["answer"].strip().lower() for n, word in zip(rows, words, strict=True)]
    counts = {"items": len(rows), "neither_yes_nor_no": words.count(None)}
    return by_category(data, {"accuracy": torch.tensor(right)}), counts


def picture_question(embedder: Embedder, data: BenchmarkData, show_progress: bool = False) -> Outcome:
    """
    The question form of MMVP-VLM (Sugar, section 4.5): which of two statements meets the first of two images, A or B.
    Each pair is asked twice, with either image first, and the right answer is A in one half of the questions, drawn by
    a seed. Sugar does not say how often a pair is asked; its numbers are multiples of 1/30, two questions a pair.

    Rows have `image_0`, `image_1`, `caption_0` and `caption_1`, and may have `category`.

    Raises:
        CannotMeasureError: the model does not generate.
    """
    questions = [(number, first) for number in range(len(data.rows)) for first in (0, 1)]
    letters = ["A", "B"] * len(data.rows)
    random.Random(0).shuffle(letters)

    def sequence(number: int, first: int, letter: str) -> list:
        row = data.rows[number]
        images = [data.open(number, f"image_{place}") for place in (first, 1 - first)]
        statements = [row[f"caption_{first}"], row[f"caption_{1 - first}"]]
        one, other = statements if letter == "A" else statements[::-1]
        question = f"which choice meets the first image:\n A.{one}\nB.{other}\n.please answer in A or B"
        return ["First Image:", images[0], "Second Image:", images[1], question]

    asked = [partial(sequence, *question, letter) for question, letter in zip(questions, letters, strict=True)]
    said = ask(embedder, asked, show_progress)
    found = [re.search(r"\b[AB]\b", answer) for answer in said]
    right = [each is not None and each.group() == letter for each, letter in zip(found, letters, strict=True)]
    counts = {"items": len(questions), "neither_a_nor_b": found.count(None)}
    return by_category(data, {"question_accuracy": torch.tensor(right)}, [n for n, _ in questions]), counts


def answer_positions(
    embedder: Embedder, data: BenchmarkData, show_progress: bool = False, *, instruction: str
) -> Outcome:
    """
    Sugar's probe of what is lost in the middle (table 5): a question about one of several pictures is asked as
    often as there are pictures, with the one that it is about at each position. `position_1_accuracy`, ... are the
    shares of right answers, yes or no, and `accuracy` is that of all of them; what is neither is wrong.

    Rows have `text` (the question), `answer`, and as many `images` as `captions`, which stand in turn before the
    question; the first of them is the one that the question is about.

    Args:
        embedder: The model.
        data: The rows.
        show_progress: Whether to draw a progress bar.
        instruction: What follows the question.

    Raises:
        CannotMeasureError: the model does not generate.
        ValueError: rows have different numbers of images, or not as many images as captions.
    """
    count = _pairs_of_each(data)
    numbers = [number for number in range(len(data.rows)) for _ in range(count)]
    positions = list(range(count)) * len(data.rows)

    def sequence(number: int, position: int) -> list:
        row = data.rows[number]
        order = list(range(1, count))
        order.insert(position, 0)
        parts: list[Any] = []
        for place in order:
            parts += [data.open(number, "images", place), row["captions"][place]]
        return [*parts, f"{row['text']} {instruction}"]

    said = ask(embedder, [partial(sequence, *each) for each in zip(numbers, positions, strict=True)], show_progress)
    words = [yes_or_no(answer) for answer in said]
    right = np.array([word == data.rows[n]["answer"] for n, word in zip(numbers, words, strict=True)], np.float64)
    scores = {f"position_{each + 1}_accuracy": Scores(right[each::count]) for each in range(count)}
    scores["accuracy"] = Scores(right, groups=np.array(numbers))
    return scores, {"items": len(data.rows), "questions": len(said), "neither_yes_nor_no": words.count(None)}


def _pairs_of_each(data: BenchmarkData) -> int:
    sizes = [(len(row["images"]), len(row["captions"])) for row in data.rows]
    if len({*sizes}) != 1 or sizes[0][0] != sizes[0][1]:
        wrong = next(place for place, each in enumerate(sizes) if each != sizes[0] or each[0] != each[1])
        raise ValueError(
            f"Row {wrong} has {sizes[wrong][0]} images and {sizes[wrong][1]} captions; each image needs a caption, "
            "and all rows need as many images as the first."
        )
    return sizes[0][0]


def interleaved_answers(
    embedder: Embedder, data: BenchmarkData, show_progress: bool = False, *, answer_tokens: int = ANSWER_TOKENS
) -> Outcome:
    """
    DEMON: questions with pictures at their places in the text. `score` is whether the nearest of the choices is right
    ([`~hf_unigd.evaluation.answer_measures.nearest_choice`]), or where there are none, ROUGE-L; by category, and over
    categories that count alike. Questions that are longer than the model's context get no answer, and are counted
    with those that it answers with nothing.

    Rows have `parts` (texts, and the places of images in `images`), `images`, `choices` (None without) with the
    number of the right one as `answer`, or `answers`, and may have `category`.

    Args:
        embedder: The model.
        data: The rows.
        show_progress: Whether to draw a progress bar.
        answer_tokens: Longest answer, in tokens.

    Raises:
        CannotMeasureError: the model does not generate.
        ImportError: what measures the answers is not installed.
    """
    model = speaker(embedder)
    choice, free = MEASURES["nearest_choice"](), MEASURES["rouge_l"]()
    rows = range(len(data.rows))

    def sequence(number: int) -> list:
        parts = data.rows[number]["parts"]
        return [part if isinstance(part, str) else data.open(number, "images", part) for part in parts]

    def answer(batch: list[list[Any]]) -> list[str]:
        said = [""] * len(batch)
        fitting = [place for place, question in enumerate(batch) if fits(model, question)]
        if fitting:
            found = answer_alone(model, [batch[place] for place in fitting], answer_tokens)
            for place, text in zip(fitting, found, strict=True):
                said[place] = text
        return said

    said = ask(embedder, [partial(sequence, number) for number in rows], show_progress, answer=answer)
    scores = []
    for number, text in zip(rows, said, strict=True):
        row = data.rows[number]
        scores.append((free if row["choices"] is None else choice)(text, row))
    counts = {"items": len(said), "without_an_answer": sum(not text.strip() for text in said)}
    return by_category(data, {"score": torch.tensor(scores, dtype=torch.float64)}), counts


def retrieval_answers(
    embedder: Embedder,
    data: BenchmarkData,
    show_progress: bool = False,
    *,
    measure: str,
    instruction: str = "",
    k: int = 3,
    use_images: bool = False,
    answer_tokens: int = ANSWER_TOKENS,
) -> Outcome:
    """
    Questions that are answered without and with retrieval ([`~hf_unigd.retrieval.answer_with_retrieval`]; Sugar,
    section 4.3 and appendix G): the measure of both, the second by the name of the first and `_with_retrieval`.

    Rows have `text` (the question) and what the measure reads, and may have `image`, `hint`, `choices` and
    `category`. What is retrieved are the rows of the benchmark's knowledge, of which `text` with `image`, `hint` and
    `choices` is embedded, and `answer` comes along where there is one. Rows of the knowledge that are questions of
    the benchmark are left out of the index and counted.

    Args:
        embedder: The model.
        data: The rows, with knowledge.
        show_progress: Whether to draw progress bars, for the index too.
        measure: Name of the measure ([`~hf_unigd.evaluation.answer_measures.MEASURES`]).
        instruction: What follows the question.
        k: How many entries stand in a prompt. Sugar does not say how many.
        use_images: Whether their pictures stand there too.
        answer_tokens: Longest answer, in tokens.

    Raises:
        CannotMeasureError: the model does not generate.
        ImportError: what makes the index or measures the answers is not installed.
        ValueError: a row cannot be used, or a prompt is longer than the model's context.
    """
    model, score = speaker(embedder), MEASURES[measure]()
    rows = range(len(data.rows))
    questions = [partial(question_parts, data, number, instruction) for number in rows]
    with knowledge_index(model, data, use_images, show_progress) as (index, counts):

        def answer(batch: list[list[Any]]) -> list[str]:
            said = answer_with_retrieval(
                model.model, model.processor, index, batch, k, use_images, answer_tokens, do_sample=False
            )
            return [each.text for each in said]

        retrieved = ask(embedder, questions, show_progress, answer=answer)
    alone = ask(embedder, questions, show_progress, answer_tokens)
    said = {measure: alone, f"{measure}_with_retrieval": retrieved}
    scores = {
        name: torch.tensor(
            [score(text, data.rows[number]) for number, text in zip(rows, answers, strict=True)], dtype=torch.float64
        )
        for name, answers in said.items()
    }
    return by_category(data, scores), {"items": len(rows), **counts}
