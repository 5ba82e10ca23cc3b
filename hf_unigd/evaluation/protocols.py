"""How benchmarks measure. Each protocol is a function of a model and rows, which benchmarks name; some have
settings, which a benchmark gives them by name.

A protocol returns the scores of items by the names of the metrics, which are their means, and the numbers of items.
All processes that a launcher started call it, and receive the same.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .benchmark_data import BenchmarkData
from .captions import caption_generation
from .categories import by_category, mean_of_means
from .embedders import Embedder
from .matches import RowReader, read_matches
from .pools import Pool, image_key, similarities
from .question_protocols import answer_positions, interleaved_answers, picture_question, retrieval_answers, yes_no
from .row_evaluation import retrieval_counts, retrieval_scores
from .scores import Outcome, Scores
from .stories import story_scores


# The sides of our retrieval tasks, as the papers name them.
_DIRECTIONS = {"anchor_to_positive": "image_to_text", "positive_to_anchor": "text_to_image"}


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
    named = {_papers_name(name): mean_of_means(each) for name, each in scores.items()}
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
    return by_category(data, {"accuracy": hits}), {"items": len(places), "images": len(images), "texts": len(texts)}


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
    return by_category(data, {"itt": itt, "tot": tot}), counts


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
    return by_category(data, scores), {"items": len(places), "images": len(images), "texts": len(texts)}


def last_picture(embedder: Embedder, data: BenchmarkData, show_progress: bool = False) -> Outcome:
    """
    Retrieval of the last picture of a story ([`~hf_unigd.evaluation.stories.story_scores`]). Rows have `captions` and
    `images`.
    """
    scores = story_scores(embedder, data.rows, data.images, show_progress=show_progress)
    return scores, {"stories": len(data.rows)}


def mteb_tasks(embedder: Embedder, data: BenchmarkData, show_progress: bool = False) -> Outcome:
    """Tasks of MTEB, run by it. Rows have the name of a `task`. The metrics of several tasks begin with its name."""
    from .mteb_tasks import run_tasks  # an extra, which its reader has asked for

    names = [row["task"] for row in data.rows]
    found = run_tasks(embedder, names, show_progress)
    if len(names) == 1:
        return found[names[0]], {"tasks": 1}
    return {f"{name}_main_score": found[name]["main_score"] for name in names}, {"tasks": len(names)}


def _add_image(pool: Pool, data: BenchmarkData, number: int, column: str, row: Mapping[str, Any]) -> int:
    return pool.add(image_key(row[column], number, column), lambda: [data.open(number, column)])


def _embed(embedder: Embedder, images: Pool, texts: Pool, show_progress: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return images.embed(embedder, "query", show_progress), texts.embed(embedder, "document", show_progress)


PROTOCOLS: dict[str, Callable[..., Outcome]] = {
    "retrieval": retrieval,
    "caption_choice": caption_choice,
    "two_positives": two_positives,
    "image_text_group": image_text_group,
    "last_picture": last_picture,
    "yes_no": yes_no,
    "picture_question": picture_question,
    "answer_positions": answer_positions,
    "interleaved_answers": interleaved_answers,
    "retrieval_answers": retrieval_answers,
    "caption_generation": caption_generation,
    "mteb": mteb_tasks,
}
