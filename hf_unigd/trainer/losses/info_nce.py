"""The symmetric contrastive loss, with hard negatives and masked duplicates, in memory linear in the batch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.utils import logging

from .gather import gather_counts, gather_rows, own_rows
from .ranges import expand_ranges


logger = logging.get_logger(__name__)

CHUNK_ELEMENTS = 2**21  # number of logits that are in memory at a time


class InfoNCELoss(nn.Module):
    r"""
    InfoNCE in both directions (VladVA, section 3.2). The directions are summed without a factor of 1/2, as reported:

        L = mean_k [ -log softmax_j(s · q_k·c_j)[k] - log softmax_j(s · q_j·p_k)[k] ]

    with queries `q`, positives `p`, and candidates `c`, which are the positives followed by the hard negatives. Only
    the first direction uses the hard negatives. In training mode, the loss covers the rows of all processes with exact
    gradients: their average over processes, which DDP computes, is the gradient of one process with the whole batch.
    In eval mode, each process uses its own rows.

    No candidate that is known to match a query is its negative. Known are the positives of all queries with the same
    key, and the further `match_keys` of that key, such as the other captions of an image. A pair of a query and a
    candidate with the key of one of these is masked in both directions, unless it is a query's own positive.

    A process compares its own queries with all candidates, which gives the first direction. The second direction needs
    one number per positive from the others, the logarithm of its denominator. The logits are computed a few rows at a
    time and, in the backward pass, again, so that the memory is linear in the size of the global batch.

    Args:
        matryoshka_dims (`list[int]`, *optional*): Prefix sizes to average the loss over. Each prefix is normalised.
            The similarities that are logged are those of the longest one.

    Citation: Ouali et al., "VladVA: Discriminative Fine-tuning of LVLMs", CVPR 2025; Oord et al., "Representation
    Learning with Contrastive Predictive Coding", 2018. Tiles of logits: Cheng et al., "Breaking the Memory Barrier:
    Near Infinite Batch Size Scaling for Contrastive Loss", 2024.
    """

    def __init__(self, matryoshka_dims: list[int] | None = None):
        super().__init__()
        self.matryoshka_dims = matryoshka_dims

    def forward(
        self,
        queries: torch.Tensor,
        positives: torch.Tensor,
        inverse_temperature: torch.Tensor,
        negatives: torch.Tensor | None = None,
        query_keys: torch.Tensor | None = None,
        positive_keys: torch.Tensor | None = None,
        negative_keys: torch.Tensor | None = None,
        match_keys: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        r"""
        Args:
            queries (`torch.FloatTensor` of shape `(n, d)`): Unit vectors.
            positives (`torch.FloatTensor` of shape `(n, d)`): Unit vectors; row `k` matches query `k`.
            inverse_temperature (`torch.FloatTensor` of shape `()`): Inverse temperature `s`.
            negatives (`torch.FloatTensor` of shape `(m, d)`, *optional*): Hard negatives of any of the queries.
            query_keys, positive_keys, negative_keys (`torch.LongTensor`, *optional*): Content keys of the rows, equal
                for equal content. Without them, all rows differ.
            match_keys (`torch.LongTensor` of shape `(k, 2)`, *optional*): Further matches: the content key of a query,
                and that of what matches it.

        Returns:
            `dict` of scalars: `loss` and, detached, `positive_similarity` and `negative_similarity` (mean cosines) and
            `masked_fraction` (of all pairs that are not positives). In training mode, every process returns those of
            the whole batch.

        Raises:
            ValueError: `negative_keys` or `match_keys` are given without the keys that they are compared with.

        With one query and no negative, every softmax has one term, so the loss is zero and a warning is logged.
        """
        if positive_keys is None and negative_keys is not None:
            raise ValueError("`negative_keys` need `positive_keys`, which they are compared with.")
        if match_keys is not None and (query_keys is None or positive_keys is None):
            raise ValueError("`match_keys` need `query_keys` and `positive_keys`, which they are compared with.")
        gather = gather_rows if self.training else own_rows
        counts, rank = gather_counts(queries) if self.training else ([len(queries)], 0)
        queries = queries.to(torch.promote_types(queries.dtype, torch.float32))
        candidates = torch.cat([gather(positives), gather(positives[:0] if negatives is None else negatives)])
        candidates = candidates.to(queries.dtype)

        count, first = sum(counts), sum(counts[:rank])
        if count == 0:
            zero = inverse_temperature * 0.0
            return dict.fromkeys(("loss", "positive_similarity", "negative_similarity", "masked_fraction"), zero)
        if len(candidates) == 1:
            logger.warning_once(
                "A batch has one query and one candidate: there are no negatives, so its contrastive loss is zero. "
                "Raise the batch size, or add hard negatives."
            )
        own = slice(first, first + len(queries))
        different = torch.arange(own.start, own.stop, device=queries.device)
        query_keys = different if query_keys is None else query_keys
        positive_keys = different if positive_keys is None else positive_keys
        known = torch.stack([query_keys, positive_keys], 1)
        known = gather(known if match_keys is None else torch.cat([known, match_keys]))
        keys = [gather(each) for each in (positive_keys, negative_keys) if each is not None]
        pairs = _Pairs(own, len(counts), _Matches(query_keys, known, torch.cat(keys)), gather)
        losses = []
        for dim in sorted(self.matryoshka_dims or [queries.shape[1]]):  # the metrics are those of the last
            if dim < queries.shape[1]:
                prefixes = F.normalize(queries[:, :dim], dim=-1), F.normalize(candidates[:, :dim], dim=-1)
            else:
                prefixes = queries, candidates
            loss, sums = _SymmetricCrossEntropy.apply(inverse_temperature * prefixes[0], prefixes[1], pairs)
            losses.append(loss)

        matched, unmatched, masked = sums.unbind()
        others, scale = count * (len(candidates) - 1), inverse_temperature.detach()
        return {
            "loss": torch.stack(losses).mean(),
            "positive_similarity": matched / scale / count,
            "negative_similarity": unmatched / scale / (others - masked).clamp(min=1),
            "masked_fraction": masked / max(others, 1),
        }


class _Matches:
    """
    Finds the candidates that match queries. The memory is linear in the number of queries, candidates and known pairs.

    Args:
        query_keys (`torch.LongTensor` of shape `(n,)`): Keys of the queries.
        known (`torch.LongTensor` of shape `(k, 2)`): Pairs of keys that match: of a query, and of a candidate.
        candidate_keys (`torch.LongTensor` of shape `(m,)`): Keys of the candidates.
    """

    def __init__(self, query_keys: torch.Tensor, known: torch.Tensor, candidate_keys: torch.Tensor):
        # Candidates with one key are a range of `order`, and pairs of one query's key a range of `known`.
        keys, self.order = candidate_keys.sort()
        known = known.unique(dim=0)
        self.candidates = _ranges(keys, known[:, 1])
        occur = self.candidates[1] > 0
        self.candidates = self.candidates[0][occur], self.candidates[1][occur]
        self.pairs = _ranges(known[occur, 0], query_keys)

    def __getitem__(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns a query, counted from the first of `rows`, and a candidate for each pair that matches, as two
        `torch.LongTensor`s of the same shape."""
        queries, pairs = expand_ranges(*(each[rows] for each in self.pairs))
        owners, places = expand_ranges(*(each[pairs] for each in self.candidates))
        return queries[owners], self.order[places]


def _ranges(keys: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each of the wanted keys is in sorted keys: the starts and lengths of ranges."""
    wanted = wanted.contiguous()
    starts = torch.searchsorted(keys, wanted)
    return starts, torch.searchsorted(keys, wanted, right=True) - starts


@dataclass
class _Pairs:
    """
    The pairs of own queries with all candidates.

    Attributes:
        own: The candidates that match the own queries.
        num_processes: Number of processes.
        matches: Finds the candidates that are no negatives of the own queries.
        gather: Gathers the rows of all processes.
    """

    own: slice
    num_processes: int
    matches: _Matches
    gather: Callable[[torch.Tensor], torch.Tensor]

    def chunks(
        self, queries: torch.Tensor, candidates: torch.Tensor, matched: torch.Tensor
    ) -> Iterator[tuple[slice, torch.Tensor, tuple[torch.Tensor, torch.Tensor], torch.Tensor]]:
        """Yields a few own rows, their logits `(rows, n + m)`, the indices of those that are masked, and a view
        `(rows,)` of the logits of the matching pairs, which are those of `matched` `(n,)` to the last bit."""
        size = max(1, CHUNK_ELEMENTS // len(candidates))
        for start in range(0, len(queries), size):
            rows, first = slice(start, start + size), self.own.start + start
            logits = queries[rows] @ candidates.T
            matching = logits[:, first:].diagonal()
            matching.copy_(matched[self.own][rows])
            row, column = self.matches[rows]
            other = column != row + first
            yield rows, logits, (row[other], column[other]), matching


class _SymmetricCrossEntropy(torch.autograd.Function):
    """
    The loss of all processes, from the scaled queries `(n_rank, d)` of this process and all candidates `(n + m, d)`.

    The gradient of a query is whole, and that of a candidate is the share of this process's queries, which
    [`gather_rows`] adds up. Both are multiplied by the number of processes, because DDP takes the mean over processes.
    The second output `(3,)` holds sums over all processes: of the logits of matching pairs, of the logits of the other
    pairs that are not masked, and the number of masked pairs.
    """

    @staticmethod
    def forward(ctx, queries, candidates, pairs: _Pairs):
        # Logits count relative to that of the matching pair, so that the loss of a good match keeps its digits.
        own_matched = (queries * candidates[pairs.own]).sum(1)
        matched = pairs.gather(own_matched)
        row_losses, column_losses = torch.empty_like(own_matched), torch.full_like(matched, -torch.inf)
        unmatched, num_masked = -own_matched.sum(), queries.new_zeros(())
        for rows, logits, masked, _ in pairs.chunks(queries, candidates, matched):
            logits[masked] = 0.0
            unmatched += logits.sum()
            num_masked += len(masked[0])
            logits[masked] = -torch.inf
            row_losses[rows] = (logits - own_matched[rows, None]).logsumexp(1)
            columns = (logits[:, : len(matched)] - matched).logsumexp(0)
            column_losses = torch.logaddexp(column_losses, columns)
        column_losses = pairs.gather(column_losses[None]).logsumexp(0)
        loss = row_losses.sum() + column_losses[pairs.own].sum()
        sums = pairs.gather(torch.stack([loss, own_matched.sum(), unmatched, num_masked])[None]).sum(0)
        loss, metrics = sums[0] / len(matched), sums[1:]
        ctx.pairs = pairs
        ctx.save_for_backward(queries, candidates, matched, row_losses, column_losses)
        ctx.mark_non_differentiable(metrics)
        return loss, metrics

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, _):
        queries, candidates, matched, row_losses, column_losses = ctx.saved_tensors
        pairs, own_matched = ctx.pairs, matched[ctx.pairs.own]
        query_gradients, candidate_gradients = torch.empty_like(queries), torch.zeros_like(candidates)
        for rows, logits, masked, matching in pairs.chunks(queries, candidates, matched):
            logits[masked] = -torch.inf
            columns = (logits[:, : len(matched)] - matched).sub_(column_losses).exp_()
            # From here on, `logits` holds the gradient of the logits: the two softmaxes minus their labels.
            logits.sub_(own_matched[rows, None]).sub_(row_losses[rows, None]).exp_()
            logits[:, : len(matched)] += columns
            matching -= 2
            query_gradients[rows] = logits @ candidates
            candidate_gradients.addmm_(logits.T, queries[rows])
        scale = gradient * pairs.num_processes / len(matched)
        return query_gradients.mul_(scale), candidate_gradients.mul_(scale), None
