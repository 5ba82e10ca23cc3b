"""MTEB's tasks, run by MTEB on whatever embeds."""

from functools import partial
from typing import Any

import mteb
import torch
from mteb.abstasks.zeroshot_classification import AbsTaskZeroShotClassification
from mteb.cache import ResultCache
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from sklearn.metrics import top_k_accuracy_score

from ..bulk import on_first_process
from .embedders import Embedder, Instructed


_SIDES = {None: "query", "query": "query", "document": "document"}


class MTEBEncoder(AbsEncoder):
    """
    A model as MTEB takes it.

    Args:
        embedder: The model.
    """

    def __init__(self, embedder: Embedder):
        self.model = embedder
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": f"hf-unigd/{embedder.name.strip('/').replace('/', '--')}",
                "revision": embedder.description.get("revision") or "unknown",
                "modalities": ["image", "text"],
                "similarity_fn_name": ScoringFunction.COSINE,
            }
        )

    def encode(self, inputs, *, task_metadata, hf_split, hf_subset, prompt_type=None, **kwargs) -> Any:
        """The embeddings of MTEB's batches of texts and images: `(n, d)`, float32."""
        sequences = [
            [batch[kind][place] for kind in ("image", "text") if kind in batch]
            for batch in inputs
            for place in range(len(next(iter(batch.values()))))
        ]
        side = _SIDES[None if prompt_type is None else prompt_type.value]
        return self.model.embed(Instructed(sequences, self.model.instruction(side))).numpy()


class TopFive(AbsTaskZeroShotClassification):
    """Zero-shot classification that also measures `top5_accuracy`, where there are more than five classes: whether the
    right one is among the first five. MTEB measures the first alone."""

    def _calculate_scores(self, labels, probs):
        scores: Any = super()._calculate_scores(labels, probs)
        if probs.shape[1] > 5:
            top_5 = top_k_accuracy_score(labels, probs, k=5, labels=range(probs.shape[1]))
            scores = {**scores, "top5_accuracy": float(top_5)}
        return scores


def _with_top_5(task: Any) -> Any:
    if not isinstance(task, AbsTaskZeroShotClassification):
        return task
    return type(type(task).__name__, (TopFive, type(task)), {})()


def run_tasks(embedder: Embedder, names: list[str], show_progress: bool = False) -> dict[str, dict[str, float]]:
    """
    Runs tasks of MTEB. It writes its own JSON where it always does: to `MTEB_CACHE`, or `~/.cache/mteb`.

    Args:
        embedder: The model.
        names: Names of the tasks.
        show_progress: Whether to show progress bars.

    Returns:
        By the name of a task, its numbers by name: the mean over its splits and subsets.
    """
    # MTEB writes files, and knows of no other processes.
    return on_first_process(partial(_run, embedder, names, show_progress))


def _run(embedder: Embedder, names: list[str], show_progress: bool) -> dict[str, dict[str, float]]:
    found = mteb.evaluate(
        MTEBEncoder(embedder),
        [_with_top_5(task) for task in mteb.get_tasks(names)],
        cache=ResultCache(),
        overwrite_strategy="always",
        show_progress_bar=show_progress,
    )
    results = {}
    for task in found.task_results:
        parts = [subset for subsets in task.scores.values() for subset in subsets]
        numbers = {name for part in parts for name, value in part.items() if isinstance(value, (int, float))}
        results[task.task_name] = {
            name: float(torch.tensor([float(part[name]) for part in parts if name in part]).mean())
            for name in sorted(numbers)
        }
    return results
