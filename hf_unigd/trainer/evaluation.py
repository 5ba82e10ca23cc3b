"""What evaluation collects from blocks of rows, and the metrics that it makes of all of them."""

import math
from collections import defaultdict
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import EvalPrediction

from ..evaluation import rank_both_ways, recalls


RANKED = 10  # candidates kept per query


class EvaluationResults:
    """
    Collects the outputs of blocks on one process, and turns those of all processes into metrics.

    A block is a batch of consecutive rows that one process evaluates, so a batch loss, which compares the rows of a
    block with each other, does not depend on the number of processes. The mean over blocks weights each by the number
    of items that its loss is a mean of.
    """

    def __init__(self) -> None:
        # One list per name and one entry per block: a process without any still takes part in the exchange.
        self.own: dict[str, list] = {name: [] for name in ("rows", "next_token", "embedded")}
        self.batch_losses: dict[str, list[tuple[float, int]]] = defaultdict(list)

    def add_block(self, rows: torch.Tensor) -> None:
        """Args: rows (`torch.LongTensor` of shape `(n,)`): The dataset's rows in this block."""
        self.own["rows"].append(rows.cpu())

    def add_batch_loss(self, name: str, loss: torch.Tensor, count: int) -> None:
        """Args: loss (`torch.FloatTensor` of shape `()`): A mean over `count` items of the block."""
        if count:
            self.batch_losses[name].append((loss.item(), count))

    def add_next_token_loss(self, total: torch.Tensor, tokens: int) -> None:
        """Args: total (`torch.FloatTensor` of shape `()`): The sum over `tokens` labelled tokens of the block."""
        if tokens:
            self.own["next_token"].append((total.double().item(), tokens))

    def add_embeddings(self, **tensors: torch.Tensor) -> None:
        """Args: tensors: `rows`, `anchors`, `positives`, `anchor_keys`, `positive_keys`; one entry per matched row."""
        if len(tensors["rows"]):
            self.own["embedded"].append({name: tensor.cpu() for name, tensor in tensors.items()})

    def gather(self) -> "EvaluationResults":
        """The results of all processes, on each of them."""
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
        """The mean of every loss that some row has, by its name: `contrastive`, `alignment`, `causal_lm`."""
        means = {name: _weighted_mean(entries) for name, entries in self.batch_losses.items()}
        if self.own["next_token"]:
            totals, tokens = zip(*self.own["next_token"], strict=True)
            means["causal_lm"] = math.fsum(totals) / sum(tokens)
        return means

    def embedded(self) -> dict[str, torch.Tensor] | None:
        """Rows, embeddings and keys of all matched rows, in the order of the rows; None where there are none."""
        parts = self.own["embedded"]
        if not parts:
            return None
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        order = tensors["rows"].argsort(stable=True)
        return {name: tensor[order] for name, tensor in tensors.items()}


def _weighted_mean(entries: list[tuple[float, int]]) -> float:
    return math.fsum(value * count for value, count in entries) / sum(count for _, count in entries)


def retrieval_prediction(embedded: dict[str, torch.Tensor]) -> tuple[EvalPrediction, dict[str, float]]:
    """
    What `compute_metrics` and [`~UniGDTrainer.predict`] receive, and the recall at 1, 5 and 10 both ways.

    Args:
        embedded: What [`EvaluationResults.embedded`] returns.

    Returns:
        `EvalPrediction`, and the recalls by name. `predictions` is a dict of arrays: `anchors` and `positives`
        (`(n, embedding_dim)`, float32), and the rankings `anchor_to_positive` and `positive_to_anchor` (`(n, k)`,
        int64). A ranking holds, for each row, the places in these arrays of its most similar candidates, best first;
        candidates with equal content are one, named by its first place. `label_ids` is a dict of arrays `(n,)`: `rows`
        (numbers in the dataset), `anchor_keys` and `positive_keys` (equal for equal content).
    """
    names = ("anchors", "positives", "anchor_keys", "positive_keys")
    rankings = rank_both_ways(**{name: embedded[name] for name in names}, k=RANKED)
    predictions: dict[str, Any] = {name: embedded[name].float().numpy() for name in names[:2]}
    for name, keys in (("anchor_to_positive", "anchor_keys"), ("positive_to_anchor", "positive_keys")):
        ranking = rankings[name]
        place = dict(zip(embedded[keys][ranking.queries].tolist(), range(len(ranking.queries)), strict=True))
        predictions[name] = ranking.candidates[[place[key] for key in embedded[keys].tolist()]].numpy()
    labels = {name: embedded[name].numpy() for name in ("rows", *names[2:])}
    return EvalPrediction(predictions=predictions, label_ids=labels), recalls(rankings)


def block_metrics(results: EvaluationResults, weights: dict[str, float]) -> dict[str, float]:
    """
    The losses of an evaluation: `loss`, the weighted objective over those losses that some row has; each loss by its
    name, and the `perplexity` of the targets.

    Args:
        results: Of all processes.
        weights: The weight of each loss in the objective.
    """
    losses = results.losses()
    metrics = {f"{name}_loss": value for name, value in losses.items()}
    objective = [weights[name] * value for name, value in losses.items() if weights[name]]
    if objective:
        metrics["loss"] = math.fsum(objective)
    if "causal_lm" in losses:
        metrics["perplexity"] = math.exp(min(losses["causal_lm"], 700.0))
    return metrics
