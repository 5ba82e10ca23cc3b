"""Collects the results of evaluation blocks and computes metrics from them."""

import math
from collections import defaultdict
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import EvalPrediction

from ..data.formats import CAPTION_ID, IMAGE_ID
from ..evaluation import rank_both_ways, recalls
from ..evaluation.items import contradiction
from ..evaluation.retrieval import first_rows, rank_on_processes


RANKED = 10  # number of candidates kept per query


class EvaluationResults:
    """
    Collects the outputs of blocks on one process and gathers those of all processes.

    A block is a batch of consecutive rows that one process evaluates. A batch loss compares the rows of a block with
    each other, so it does not depend on the number of processes, except for streaming datasets, whose blocks are made
    per process. The mean over blocks weights each block by the number of items that its loss averages over.
    """

    def __init__(self) -> None:
        # One list per name and one entry per block. Every process has all names, because all gather the same lists.
        self.own: dict[str, list] = {name: [] for name in ("rows", "next_token", "embedded")}
        self.batch_losses: dict[str, list[tuple[float, int]]] = defaultdict(list)

    def add_block(self, rows: torch.Tensor) -> None:
        """
        Adds a block.

        Args:
            rows (`torch.LongTensor` of shape `(n,)`): Indices of its rows in the dataset.
        """
        self.own["rows"].append(rows.cpu())

    def add_batch_loss(self, name: str, loss: torch.Tensor, count: int) -> None:
        """
        Adds a batch loss of a block. A `count` of 0 adds nothing.

        Args:
            name: Name of the loss.
            loss (`torch.FloatTensor` of shape `()`): The mean over `count` items of the block.
            count: Number of items.
        """
        if count:
            self.batch_losses[name].append((loss.item(), count))

    def add_next_token_loss(self, total: torch.Tensor, tokens: int) -> None:
        """
        Adds the next-token loss of a block. Zero `tokens` add nothing.

        Args:
            total (`torch.FloatTensor` of shape `()`): The sum over the labelled tokens of the block.
            tokens: Number of labelled tokens.
        """
        if tokens:
            self.own["next_token"].append((total.double().item(), tokens))

    def add_embeddings(self, **tensors: torch.Tensor) -> None:
        """
        Adds the embeddings of a block.

        Args:
            tensors: `rows`, `anchors`, `positives`, `anchor_items` and `positive_items`, with one entry per row with a
                positive.
        """
        if len(tensors["rows"]):
            self.own["embedded"].append({name: tensor.cpu() for name, tensor in tensors.items()})

    def gather(self) -> "EvaluationResults":
        """Returns the results of all processes, on every process."""
        everywhere = EvaluationResults()
        everywhere.own = {name: gather_object(entries) for name, entries in self.own.items()}
        losses = [(name, entry) for name, entries in self.batch_losses.items() for entry in entries]
        for name, entry in gather_object(losses):
            everywhere.batch_losses[name].append(entry)
        return everywhere

    @property
    def num_rows(self) -> int:
        return sum(map(len, self.own["rows"]))

    def losses(self) -> dict[str, float]:
        """Returns the mean of every loss that some row has, by name: `contrastive`, `alignment`, `causal_lm`."""
        means = {name: _weighted_mean(entries) for name, entries in self.batch_losses.items()}
        if self.own["next_token"]:
            totals, tokens = zip(*self.own["next_token"], strict=True)
            means["causal_lm"] = math.fsum(totals) / sum(tokens)
        return means

    def embedded(self) -> dict[str, torch.Tensor] | None:
        """Returns the tensors of [`add_embeddings`] of all blocks, sorted by row, or `None` if there are none."""
        parts = self.own["embedded"]
        if not parts:
            return None
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        order = tensors["rows"].argsort(stable=True)
        return {name: tensor[order] for name, tensor in tensors.items()}


def _weighted_mean(entries: list[tuple[float, int]]) -> float:
    return math.fsum(value * count for value, count in entries) / sum(count for _, count in entries)


def retrieval_prediction(
    embedded: dict[str, torch.Tensor], device: torch.device
) -> tuple[EvalPrediction, dict[str, float]]:
    """
    Returns the prediction that `compute_metrics` receives and [`~UniGDTrainer.predict`] returns, and recall at 1, 5
    and 10 in both directions, with the numbers of queries and candidates. All processes call it together
    ([`~hf_unigd.evaluation.retrieval.rank_on_processes`]).

    Args:
        embedded: The result of [`EvaluationResults.embedded`], the same on all processes.
        device: The device of this process.

    Returns:
        `EvalPrediction` and the metrics by name. `predictions` is a `dict` of arrays: `anchors` and `positives`
        (`(n, embedding_dim)`, float32), and the rankings `anchor_to_positive` and `positive_to_anchor` (`(n, k)`,
        int64). A ranking holds, for each row, the indices in these arrays of the most similar candidates, best first.
        Candidates that are one item have the index of the first. `label_ids` is a `dict` of arrays of
        shape `(n,)`: `rows` (indices in the dataset), `anchor_keys` and `positive_keys`, equal for one item
        ([`~hf_unigd.evaluation.items.items_of`]).

    Raises:
        ValueError: rows of equal ids have different content.
    """
    embedded = {
        **embedded,
        "anchor_keys": _item_keys(embedded["anchor_items"], embedded["rows"], IMAGE_ID),
        "positive_keys": _item_keys(embedded["positive_items"], embedded["rows"], CAPTION_ID),
    }
    names = ("anchors", "positives", "anchor_keys", "positive_keys")
    rank = partial(rank_on_processes, device=device)
    rankings = rank_both_ways(**{name: embedded[name] for name in names}, k=RANKED, rank=rank)
    predictions: dict[str, Any] = {name: embedded[name].float().numpy() for name in names[:2]}
    for name, keys in (("anchor_to_positive", "anchor_keys"), ("positive_to_anchor", "positive_keys")):
        ranking = rankings[name]
        place = dict(zip(embedded[keys][ranking.queries].tolist(), range(len(ranking.queries)), strict=True))
        predictions[name] = ranking.candidates[[place[key] for key in embedded[keys].tolist()]].numpy()
    labels = {name: embedded[name].numpy() for name in ("rows", *names[2:])}
    metrics: dict[str, float] = recalls(rankings)
    sides = [len(ranking.queries) for ranking in rankings.values()]
    for name, queries, candidates in zip(rankings, sides, sides[::-1], strict=True):
        metrics |= {f"{name}_queries": queries, f"{name}_candidates": candidates}
    return EvalPrediction(predictions=predictions, label_ids=labels), metrics


def _item_keys(items: torch.Tensor, rows: torch.Tensor, id_name: str) -> torch.Tensor:
    """The keys of items, after a check that each has one content. No other item has a negative key."""
    keys, contents = items.T
    keys = torch.where(keys == -1, -1 - torch.arange(len(keys)), keys)
    first = first_rows(keys)
    if len(others := (contents[first] != contents).nonzero()):
        second = int(others[0])
        raise contradiction(f"`{id_name}`", int(rows[first[second]]), int(rows[second]))
    return keys


def block_metrics(results: EvaluationResults, weights: dict[str, float]) -> dict[str, float]:
    """
    Returns each loss that some row has (`contrastive_loss`, `alignment_loss`, `causal_lm_loss`), their weighted sum
    `loss`, and the `perplexity` of the targets.

    Args:
        results: The results of all processes.
        weights: Weight of each loss in the objective.
    """
    losses = results.losses()
    metrics = {f"{name}_loss": value for name, value in losses.items()}
    objective = [weights[name] * value for name, value in losses.items() if weights[name]]
    if objective:
        metrics["loss"] = math.fsum(objective)
    if "causal_lm" in losses:
        metrics["perplexity"] = math.exp(min(losses["causal_lm"], 700.0))
    return metrics
