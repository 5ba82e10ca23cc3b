"""How benchmarks measure. Each protocol is a function of a model and rows, which benchmarks name.

A protocol returns the scores of items by the names of the metrics, which are their means, and the numbers of items.
All processes that a launcher started call it, and receive the same.
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
import torch
from accelerate.utils import gather_object

from ..bulk import process_state
from .benchmark_data import BenchmarkData
from .embedders import CannotMeasureError, Embedder, ModelEmbedder
from .matches import RowReader, read_matches
from .pools import Pool, image_key, similarities
from .row_evaluation import retrieval_counts, retrieval_scores
from .scores import Scores
from .stories import story_scores


# Scores by metric, or the metric itself where others measure it; and numbers of items.
Outcome: TypeAlias = tuple[Mapping[str, Scores | float], dict[str, int]]
# The sides of our retrieval tasks, as the papers name them.
_DIRECTIONS = {"anchor_to_positive": "image_to_text", "positive_to_anchor": "text_to_image"}
_ANSWER_TOKENS = 16


def retrieval(embedder: Embedder, data: BenchmarkData, show_progress: bool = False) -> Outcome:
    """
    Recall at 1, 5 and 10 from images to texts and back, where any caption of an image counts. Rows have `image` and
    `captions`, and may have `image_id`, `caption_id` and `category`. The images of each category are a pool of their
    own, and the recall is the mean over categories.
    """
    by_category: dict[Any, list[int]] = {}
    for number, row in enumerate(data.rows):
        by_category.setdefault(row.get("category"), []).append(number)
    scores: dict[str, list[Scores]] = {}
    counts: dict[str, int] = {}
    for numbers in by_category.values():
        matches = read_matches(RowReader.of(_Captioned(data.rows, numbers), embedder, data.images))
        for name, each in retrieval_scores(embedder, matches, show_progress=show_progress).items():
            scores.setdefault(name, []).append(each)
        for name, count in (matches.counts | retrieval_counts(matches)).items():
            counts[name] = counts.get(name, 0) + count
    named = {_papers_name(name): _mean_of_means(each) for name, each in scores.items()}
    return named, {_papers_name(name): count for name, count in counts.items()}


class _Captioned(Sequence):
    """Some rows of a benchmark, as an image with its captions."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], numbers: list[int]):
        self.rows, self.numbers = rows, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place):
        row = self.rows[self.numbers[place]]
        named = {"image": row["image"], "caption": row["captions"]}
        return named | {name: row[name] for name in ("image_id", "caption_id") if name in row}


def _papers_name(name: str) -> str:
    for ours, papers in _DIRECTIONS.items():
        name = name.replace(ours, papers)
    return name


def _mean_of_means(parts: list[Scores]) -> Scores:
    """Scores whose mean is that of the means of the parts, whatever their sizes."""
    if len(parts) == 1:
        return parts[0]
    groups, first = [], 0
    for part in parts:
        own = np.arange(len(part.values)) if part.groups is None else part.groups
        groups.append(own + first)
        first += int(own.max()) + 1
    return Scores(
        np.concatenate([part.values for part in parts]),
        np.concatenate([np.full(len(part.values), 1 / len(part.values)) for part in parts]),
        np.concatenate(groups),
    )


def caption_choice(embedder: Embedder, data: BenchmarkData, show_progress: bool = False) -> Outcome:
    """
    SugarCrepe: `accuracy`, whether an image is more similar to its caption than to a wrong one, by category. Rows have
    `image`, `caption` and `negative`, and may have `category`.
    """
    images, texts = Pool(), Pool()
    places = [
        (
            _add_image(images, data, number, "image", row),
            texts.add_text(row["caption"]),
            texts.add_text(row["negative"]),
        )
        for number, row in enumerate(data.rows)
    ]
    vectors, captions = _embed(embedder, images, texts, show_progress)
    image, right, wrong = zip(*places, strict=True)
    hits = similarities(vectors, image, captions, right) > similarities(vectors, image, captions, wrong)
    return _by_category(data, {"accuracy": hits}), {"items": len(places), "images": len(images), "texts": len(texts)}


def two_positives(embedder: Embedder, data: BenchmarkData, show_progress: bool = False) -> Outcome:
    """
    SugarCrepe++: `itt`, whether an image is more similar to both of its captions than to a wrong one, and `tot`,
    whether the captions are more similar to each other than either is to the wrong one, by category. Rows have
    `image`, `caption`, `caption2` and `negative`, and may have `category`.
    """
    images, texts = Pool(), Pool()
    places = [
        (
            _add_image(images, data, number, "image", row),
            *(texts.add_text(row[name]) for name in ("caption", "caption2", "negative")),
        )
        for number, row in enumerate(data.rows)
    ]
    vectors, captions = _embed(embedder, images, texts, show_progress)
    image, first, second, wrong = zip(*places, strict=True)
    to_wrong = similarities(vectors, image, captions, wrong)
    itt = (similarities(vectors, image, captions, first) > to_wrong) & (
        similarities(vectors, image, captions, second) > to_wrong
    )
    together = similarities(captions, first, captions, second)
    tot = (together > similarities(captions, first, captions, wrong)) & (
        together > similarities(captions, second, captions, wrong)
    )
    counts = {"items": len(places), "images": len(images), "texts": len(texts)}
    return _by_category(data, {"itt": itt, "tot": tot}), counts


def image_text_group(embedder: Embedder, data: BenchmarkData, show_progress: bool = False) -> Outcome:
    """
    Winoground: `text_score`, whether each of two images is more similar to its own text than to the other;
    `image_score`, whether each text is more similar to its own image; `group_score`, whether both hold. Rows have
    `image_0`, `image_1`, `caption_0` and `caption_1`, and may have `category`.
    """
    images, texts = Pool(), Pool()
    places = [
        (
            *(_add_image(images, data, number, name, row) for name in ("image_0", "image_1")),
            *(texts.add_text(row[name]) for name in ("caption_0", "caption_1")),
        )
        for number, row in enumerate(data.rows)
    ]
    vectors, captions = _embed(embedder, images, texts, show_progress)
    image_0, image_1, text_0, text_1 = zip(*places, strict=True)
    (s00, s01), (s10, s11) = (
        [similarities(vectors, image, captions, text) for text in (text_0, text_1)] for image in (image_0, image_1)
    )
    text, image = (s00 > s01) & (s11 > s10), (s00 > s10) & (s11 > s01)
    scores = {"text_score": text, "image_score": image, "group_score": text & image}
    return _by_category(data, scores), {"items": len(places), "images": len(images), "texts": len(texts)}


def last_picture(embedder: Embedder, data: BenchmarkData, show_progress: bool = False) -> Outcome:
    """
    Retrieval of the last picture of a story ([`~hf_unigd.evaluation.stories.story_scores`]). Rows have `captions` and
    `images`.
    """
    scores = story_scores(embedder, data.rows, data.images, show_progress=show_progress)
    return scores, {"stories": len(data.rows)}


def yes_no(embedder: Embedder, data: BenchmarkData, show_progress: bool = False) -> Outcome:
    """
    POPE: whether a model that is asked answers "yes" or "no" as it should, by category; what is neither is wrong. Rows
    have `image`, `question` and `answer`, and may have `category`.

    Raises:
        CannotMeasureError: the model does not generate.
    """
    rows = list(range(len(data.rows)))

    def question(number: int) -> list:
        return [_open(data, number, "image"), data.rows[number]["question"]]

    said = _ask(embedder, [partial(question, number) for number in rows])
    words = [re.search(r"\b(yes|no)\b", answer.lower()) for answer in said]
    right = [
        word is not None and word.group(1) == data.rows[n]["answer"].strip().lower()
        for n, word in zip(rows, words, strict=True)
    ]
    counts = {"items": len(rows), "neither_yes_nor_no": words.count(None)}
    return _by_category(data, {"accuracy": torch.tensor(right)}), counts


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
        images = [_open(data, number, f"image_{place}") for place in (first, 1 - first)]
        statements = [row[f"caption_{first}"], row[f"caption_{1 - first}"]]
        one, other = statements if letter == "A" else statements[::-1]
        question = f"which choice meets the first image:\n A.{one}\nB.{other}\n.please answer in A or B"
        return ["First Image:", images[0], "Second Image:", images[1], question]

    asked = [partial(sequence, *question, letter) for question, letter in zip(questions, letters, strict=True)]
    said = _ask(embedder, asked)
    found = [re.search(r"\b[AB]\b", answer) for answer in said]
    right = [each is not None and each.group() == letter for each, letter in zip(found, letters, strict=True)]
    counts = {"items": len(questions), "neither_a_nor_b": found.count(None)}
    return _by_category(data, {"question_accuracy": torch.tensor(right)}, [n for n, _ in questions]), counts


@torch.no_grad()
def _ask(embedder: Embedder, questions: Sequence[Callable[[], list]]) -> list[str]:
    """The answers of a model to questions, each of which is made when it is asked. Processes share them."""
    if not isinstance(embedder, ModelEmbedder):
        raise CannotMeasureError(f"{embedder.name} does not generate, and this benchmark asks questions.")
    model, processor = embedder.model, embedder.processor
    state = process_state()
    own = list(range(state.process_index, len(questions), state.num_processes))
    answers: dict[int, str] = {}
    for start in range(0, len(own), embedder.batch_size):
        numbers = own[start : start + embedder.batch_size]
        batch = processor.process_sequences(
            [questions[number]() for number in numbers],
            prompted=False,
            padding_side="left",
            max_length=model.config.context_length,
        ).to(model.device, model.dtype)
        generated = model.generate(**batch, max_new_tokens=_ANSWER_TOKENS, do_sample=False)
        said = processor.batch_decode(generated[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        answers |= dict(zip(numbers, said, strict=True))
    found = dict(chain.from_iterable(each.items() for each in gather_object([answers])))
    return [found[number] for number in range(len(questions))]


def mteb_tasks(embedder: Embedder, data: BenchmarkData, show_progress: bool = False) -> Outcome:
    """Tasks of MTEB, run by it. Rows have the name of a `task`. The metrics of several tasks begin with its name."""
    from .mteb_tasks import run_tasks  # an extra, which its reader has asked for

    names = [row["task"] for row in data.rows]
    found = run_tasks(embedder, names, show_progress)
    if len(names) == 1:
        return found[names[0]], {"tasks": 1}
    return {f"{name}_main_score": found[name]["main_score"] for name in names}, {"tasks": len(names)}


def _open(data: BenchmarkData, number: int, column: str) -> Any:
    return data.images.open(data.rows[number][column])


def _add_image(pool: Pool, data: BenchmarkData, number: int, column: str, row: Mapping[str, Any]) -> int:
    return pool.add(image_key(row[column], number, column), lambda: [_open(data, number, column)])


def _embed(embedder: Embedder, images: Pool, texts: Pool, show_progress: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return images.embed(embedder, "query", show_progress), texts.embed(embedder, "document", show_progress)


def _by_category(
    data: BenchmarkData, hits: Mapping[str, torch.Tensor], numbers: Sequence[int] | None = None
) -> dict[str, Scores]:
    """Scores for each category, and over categories that count alike. Without categories, of all items. `numbers` are
    the rows of the items, if a row has several; they are one group."""
    of_rows = [row.get("category") for row in data.rows]
    rows = np.arange(len(of_rows)) if numbers is None else np.array(numbers)
    categories = [of_rows[number] for number in rows]
    found: dict[str, Scores] = {}
    for metric, each in hits.items():
        values = each.numpy().astype(np.float64)
        parts = {
            category: _part(values, rows, [place for place, own in enumerate(categories) if own == category])
            for category in dict.fromkeys(categories)
        }
        if None not in parts:
            found |= {f"{category}_{metric}": scores for category, scores in parts.items()}
        found[metric] = _mean_of_means(list(parts.values()))
    return found


def _part(values: np.ndarray, rows: np.ndarray, places: list[int]) -> Scores:
    own = rows[places]
    return Scores(values[places], groups=own if len(set(own)) < len(own) else None)


PROTOCOLS: dict[str, Callable[..., Outcome]] = {
    "retrieval": retrieval,
    "caption_choice": caption_choice,
    "two_positives": two_positives,
    "image_text_group": image_text_group,
    "last_picture": last_picture,
    "yes_no": yes_no,
    "picture_question": picture_question,
    "mteb": mteb_tasks,
}
