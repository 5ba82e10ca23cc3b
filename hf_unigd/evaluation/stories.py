"""Finding the last picture of an illustrated story, as FROMAGe set it up on VIST (Sugar, table 3b)."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..data.example import content_key
from ..modeling import UniGDProcessor
from ..retrieval import embed_sequences
from .retrieval import rank_candidates, recall_metric


def last_picture_recall(
    model: PreTrainedModel,
    processor: UniGDProcessor,
    stories: Sequence[dict[str, Any]],
    ks: tuple[int, ...] = (1, 5, 10),
    batch_size: int = 32,
    show_progress: bool = True,
) -> dict[str, float]:
    """
    Recall of each story's last picture among the distinct pictures of all stories but those seen earlier in it.

    Args:
        model: A [`UniGDModel`] or [`UniGDForConditionalGeneration`].
        processor: Its processor.
        stories: Rows with `captions` (texts) and as many `images` (PIL), the last of which is looked for.
        ks: Cut-offs.
        batch_size: Sequences a forward pass.
        show_progress: Whether to draw progress bars.

    Returns:
        By query, `"5c_recall_at_1"`, ... (all captions) and `"5c+4i_recall_at_1"`, ... (with the pictures before the
        last between them); the numbers are those of the stories, five captions and four pictures in VIST's.

    Raises:
        ValueError: there are no stories, or one has not as many captions as images.
    """
    told = [stories[place] for place in range(len(stories))]
    for place, story in enumerate(told):
        if len(story["captions"]) != len(story["images"]) or not story["captions"]:
            raise ValueError(
                f"Story {place} has {len(story['captions'])} captions and {len(story['images'])} images; each picture "
                "needs its caption."
            )
    if not told:
        raise ValueError("There are no stories.")
    keys = [[content_key([{"content": [{"type": "image", "image": image}]}]) for image in s["images"]] for s in told]
    pool: dict[int, Any] = {}
    for story, of_story in zip(told, keys, strict=True):
        pool |= dict(zip(of_story, story["images"], strict=True))
    place_of = {key: place for place, key in enumerate(pool)}

    def embed(sequences):
        return embed_sequences(model, processor, sequences, batch_size, show_progress=show_progress)

    candidates = embed([[image] for image in pool.values()])
    metrics: dict[str, float] = {}
    for name, queries in (
        (f"{len(told[0]['captions'])}c", [list(story["captions"]) for story in told]),
        (f"{len(told[0]['captions'])}c+{len(told[0]['captions']) - 1}i", [_interleaved(story) for story in told]),
    ):
        rankings = []
        for query, of_story in zip(embed(queries), keys, strict=True):
            unseen = torch.tensor([place for key, place in place_of.items() if key not in of_story[:-1]])
            (ranking,) = rank_candidates(query[None], candidates[unseen], max(ks))
            rankings.append(unseen[ranking].tolist())
        recalls = recall_metric().compute(
            predictions=rankings, references=[[place_of[of_story[-1]]] for of_story in keys], ks=ks
        )
        metrics |= {f"{name}_{recall}": value for recall, value in recalls.items()}
    return metrics


def _interleaved(story) -> list:
    """Captions and pictures in turn, without the last picture."""
    parts: list = []
    for caption, image in zip(story["captions"], story["images"], strict=True):
        parts += [caption, image]
    return parts[:-1]
