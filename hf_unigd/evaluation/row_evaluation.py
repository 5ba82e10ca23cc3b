"""Evaluation on rows of any accepted format: retrieval in both directions, and perplexity."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset

from ..bulk import process_state
from .embedders import Embedder, ModelEmbedder, embed_on_processes
from .matches import ImageSettings, Matches, RowReader, Side, read_matches
from .perplexity import perplexity
from .results import Result
from .retrieval import rank_on_processes, rank_pairs
from .scores import Scores


KS = (1, 5, 10)


def evaluate_rows(
    embedder: Embedder,
    rows: Any,
    name: str,
    dataset: Mapping[str, Any],
    images: ImageSettings | None = None,
    skip_bad_rows: bool = False,
    show_progress: bool = True,
) -> Result:
    """
    Evaluates a model on rows of any accepted format. If a launcher started several processes, all call this, share the
    work, and receive the same result.

    - Retrieval at 1, 5 and 10 in both directions among the items of [`~hf_unigd.evaluation.matches.read_matches`]: the
      share of queries with a match among their first k candidates. A caption of any length takes part, and each
      distinct image and text is embedded once.
    - The perplexity of long captions, of every `caption`, and of answers, if the model generates.

    Args:
        embedder: The model.
        rows: The rows, map-style.
        name: Name of the result.
        dataset: Description of the rows, for the result.
        images: How images are opened.
        skip_bad_rows: Leave bad rows out, each with its reason in the log, and count them.
        show_progress: Whether to draw progress bars.

    Raises:
        ValueError: there are no rows, they are a stream, or they have neither matches nor targets.
        RowError: a row is bad and `skip_bad_rows` is off.
    """
    if isinstance(rows, IterableDataset):
        raise ValueError("Evaluation reads rows more than once, which a stream does not allow. Load them whole.")
    if len(rows) == 0:
        raise ValueError("The dataset has no rows.")
    images = images or ImageSettings()
    matches = read_matches(RowReader.of(rows, embedder, images), skip_bad_rows)
    counts = dict(matches.counts)
    scores: dict[str, Scores] = {}
    if len(matches.pairs):
        scores |= retrieval_scores(embedder, matches, show_progress=show_progress)
        counts |= retrieval_counts(matches)
    if isinstance(embedder, ModelEmbedder):
        targets = perplexity(embedder, RowReader.of(rows, embedder, images, 0), skip_bad_rows)
        if targets is not None:
            scores["perplexity"] = targets
            counts["targets"] = len(targets.values)
    if not scores:
        raise ValueError(
            f"None of the {len(rows)} rows can be evaluated: {counts['skipped']} are bad, and the others have "
            "neither a match nor a text that this model generates."
        )
    return Result(name, dataset, {metric: each.metric for metric, each in scores.items()}, counts, scores)


def retrieval_scores(
    embedder: Embedder, matches: Matches, ks: tuple[int, ...] = KS, show_progress: bool = False
) -> dict[str, Scores]:
    """
    Retrieval in both directions.

    Args:
        embedder: The model.
        matches: What is compared.
        ks: The values of k.
        show_progress: Whether to draw progress bars.

    Returns:
        For each k, `anchor_to_positive_recall_at_k` and `positive_to_anchor_recall_at_k`: whether each query has a
        match among its first k candidates. The captions of an image are one group.
    """
    anchors, positives = (_vectors(embedder, side, show_progress) for side in (matches.anchors, matches.positives))
    rank = partial(rank_on_processes, device=process_state().device)
    rankings = rank_pairs(anchors, positives, matches.pairs, max(ks), rank)
    groups = {"anchor_to_positive": None, "positive_to_anchor": _groups(matches)}
    return {
        f"{name}_recall_at_{k}": Scores(np.array(ranking.hits(k), dtype=np.float64), groups=groups[name])
        for name, ranking in rankings.items()
        for k in ks
    }


def retrieval_counts(matches: Matches) -> dict[str, int]:
    """The numbers of queries and candidates in both directions."""
    anchors, positives = len(matches.anchors.items), len(matches.positives.items)
    return {
        "anchor_to_positive_queries": anchors,
        "anchor_to_positive_candidates": positives,
        "positive_to_anchor_queries": positives,
        "positive_to_anchor_candidates": anchors,
    }


def _vectors(embedder: Embedder, side: Side, show_progress: bool) -> torch.Tensor:
    return embed_on_processes(embedder, side.contents, show_progress)[torch.tensor(side.items)]


def _groups(matches: Matches) -> np.ndarray:
    """The first anchor that each positive matches."""
    groups = np.full(len(matches.positives.items), len(matches.anchors.items))
    np.minimum.at(groups, matches.pairs[:, 1].numpy(), matches.pairs[:, 0].numpy())
    return groups
