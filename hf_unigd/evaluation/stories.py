"""Retrieval of the last image of an illustrated story, the task that FROMAGe set up on VIST (Sugar, table 3b)."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..bulk.sequences import embed_sequences
from ..data.example import image_key
from ..modeling import UniGDProcessor
from .retrieval import rank_candidates, recall_metric


def last_image_recall(
    model: PreTrainedModel,
    processor: UniGDProcessor,
    stories: Sequence[dict[str, Any]],
    ks: tuple[int, ...] = (1, 5, 10),
    batch_size: int = 32,
    show_progress: bool = True,
) -> dict[str, float]:
    """
    Computes the recall of the last image of each story.

    The candidates of a story are the distinct images of all stories, without those that come earlier in the story.
    Queries and candidates get the processor's instructions of a `"query"` and of a `"document"`.

    Args:
        model: A [`UniGDModel`] or [`UniGDForConditionalGeneration`].
        processor: The processor of the model.
        stories: Rows with `captions` (texts) and as many `images` (PIL images). The last image is to be retrieved.
        ks: The values of k.
        batch_size: Sequences per forward pass.
        show_progress: Whether to show progress bars.

    Returns:
        Recalls between 0 and 1 by name: `"5c_recall_at_1"`, ... for queries of all captions, and
        `"5c+4i_recall_at_1"`, ... for queries of all captions interleaved with the images before the last. The numbers
        in the names are those of the first story; VIST's stories have five captions and four images before the last.

    Raises:
        ValueError: there are no stories, or a story does not have as many captions as images.
    """
    told = [stories[place] for place in range(len(stories))]
    for place, story in enumerate(told):
        if len(story["captions"]) != len(story["images"]) or not story["captions"]:
            raise ValueError(
                f"Story {place} has {len(story['captions'])} captions and {len(story['images'])} images; every image "
                "needs one caption, and a story needs at least one image."
            )
    if not told:
        raise ValueError("There are no stories.")
    keys = [[image_key({"image": image}) for image in story["images"]] for story in told]
    pool: dict[str, Any] = {}
    for story, story_keys in zip(told, keys, strict=True):
        pool |= dict(zip(story_keys, story["images"], strict=True))
    places = {key: place for place, key in enumerate(pool)}

    def embed(sequences, prompt_name):
        return embed_sequences(
            model, processor, sequences, batch_size, show_progress=show_progress, prompt_name=prompt_name
        )

    candidates = embed([[image] for image in pool.values()], "document")
    metrics: dict[str, float] = {}
    for name, queries in (
        (f"{len(told[0]['captions'])}c", [list(story["captions"]) for story in told]),
        (f"{len(told[0]['captions'])}c+{len(told[0]['captions']) - 1}i", [_interleaved(story) for story in told]),
    ):
        rankings = []
        for query, story_keys in zip(embed(queries, "query"), keys, strict=True):
            unseen = torch.tensor([place for key, place in places.items() if key not in story_keys[:-1]])
            (ranking,) = rank_candidates(query[None], candidates[unseen], max(ks))
            rankings.append(unseen[ranking].tolist())
        recalls = recall_metric().compute(
            predictions=rankings, references=[[places[story_keys[-1]]] for story_keys in keys], ks=ks
        )
        metrics |= {f"{name}_{recall}": value for recall, value in recalls.items()}
    return metrics


def _interleaved(story) -> list:
    """Returns the captions and images of a story in turn, without the last image."""
    parts: list = []
    for caption, image in zip(story["captions"], story["images"], strict=True):
        parts += [caption, image]
    return parts[:-1]
