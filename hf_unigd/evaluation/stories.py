"""Retrieval of the last image of an illustrated story, the task that FROMAGe set up on VIST (Sugar, table 3b)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ..data.example import image_key
from ..modeling import UniGDProcessor
from .embedders import Embedder, ModelEmbedder
from .matches import ImageSettings
from .pools import Pool
from .retrieval import rank_candidates
from .scores import Scores


def last_image_recall(
    model: PreTrainedModel,
    processor: UniGDProcessor,
    stories: Sequence[dict[str, Any]],
    ks: tuple[int, ...] = (1, 5, 10),
    batch_size: int = 32,
    show_progress: bool = True,
) -> dict[str, float]:
    """
    Computes the recall of the last image of each story, among the distinct images of all stories without those that
    come earlier in the story.

    Args:
        model: A [`UniGDForConditionalGeneration`].
        processor: The processor of the model.
        stories, ks: As in [`story_scores`].
        batch_size: Sequences per forward pass.
        show_progress: Whether to show progress bars.

    Returns:
        Recalls between 0 and 1 by name: `"5c_recall_at_1"`, ... for queries of all captions, and
        `"5c+4i_recall_at_1"`, ... for queries of all captions interleaved with the images before the last.

    Raises:
        ValueError: there are no stories, or a story does not have as many captions as images.
    """
    embedder = ModelEmbedder(model, processor, model.name_or_path, batch_size)
    scores = story_scores(embedder, stories, ks=ks, show_progress=show_progress)
    unseen = {name: each for name, each in scores.items() if "_unseen_" in name}
    return {name.replace("_unseen", ""): each.metric for name, each in unseen.items()}


def story_scores(
    embedder: Embedder,
    stories: Sequence[Mapping[str, Any]],
    images: ImageSettings | None = None,
    ks: tuple[int, ...] = (1, 5, 10),
    show_progress: bool = False,
) -> dict[str, Scores]:
    """
    Whether the last image of each story is among the first k of the distinct images of all stories. Queries and
    candidates get the model's instructions of a `"query"` and of a `"document"`.

    Args:
        embedder: The model.
        stories: Rows with `captions` (texts) and as many `images`. The last image is to be retrieved.
        images: How images are opened.
        ks: The values of k.
        show_progress: Whether to show progress bars.

    Returns:
        Scores by name: `"5c_recall_at_1"`, ... for queries of all captions; `"5c+4i_recall_at_1"`, ... for queries of
        all captions interleaved with the images before the last; and `"5c_unseen_recall_at_1"`, ... where the images
        that come earlier in the story are no candidates (the dagger of Sugar's table). The numbers in the names are
        those of the first story; VIST's stories have five captions and four images before the last.

    Raises:
        ValueError: there are no stories, or a story does not have as many captions as images.
    """
    images = images or ImageSettings()
    pool, places = Pool(), []
    for place in range(len(stories)):
        story = stories[place]
        if len(story["captions"]) != len(story["images"]) or not story["captions"]:
            raise ValueError(
                f"Story {place} has {len(story['captions'])} captions and {len(story['images'])} images; every image "
                "needs one caption, and a story needs at least one image."
            )
        places.append([_add(pool, stories, images, place, number) for number in range(len(story["images"]))])
    if not places:
        raise ValueError("There are no stories.")
    candidates = pool.embed(embedder, "document", show_progress)
    length = len(stories[0]["captions"])
    scores: dict[str, Scores] = {}
    for name, with_images in ((f"{length}c", False), (f"{length}c+{length - 1}i", True)):
        queries = Pool()
        for place in range(len(stories)):
            queries.add(place, _reader(stories, images, place, with_images))
        vectors = queries.embed(embedder, "query", show_progress)
        for suffix, earlier in (("", False), ("_unseen", True)):
            first = [
                _ranking(vector, candidates, own[:-1] if earlier else [], max(ks))
                for vector, own in zip(vectors, places, strict=True)
            ]
            for k in ks:
                hits = [own[-1] in ranking[:k] for own, ranking in zip(places, first, strict=True)]
                scores[f"{name}{suffix}_recall_at_{k}"] = Scores(np.array(hits, dtype=np.float64))
    return scores


def _add(pool: Pool, stories: Sequence[Mapping[str, Any]], images: ImageSettings, place: int, number: int) -> int:
    """Adds an image of a story: those of one path, or of equal pixels, are one."""
    value = stories[place]["images"][number]
    key = value if isinstance(value, str) else image_key({"image": images.open(value)})
    return pool.add(key, lambda: [images.open(stories[place]["images"][number])])


def _reader(stories: Sequence[Mapping[str, Any]], images: ImageSettings, place: int, with_images: bool):
    """Reads the captions of a story, in turn with its images but for the last."""

    def read() -> list:
        story = stories[place]
        if not with_images:
            return list(story["captions"])
        parts: list = []
        for caption, image in zip(story["captions"], story["images"], strict=True):
            parts += [caption, images.open(image)]
        return parts[:-1]

    return read


def _ranking(query: torch.Tensor, candidates: torch.Tensor, left_out: list[int], k: int) -> list[int]:
    """The first candidates of a query, without some."""
    ranking = rank_candidates(query[None], candidates, k + len(left_out))[0].tolist()
    return [place for place in ranking if place not in left_out][:k]
