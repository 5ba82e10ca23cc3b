"""The symmetric contrastive loss, with hard negatives and masked duplicates."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import logging

from .gather import gather_rows


logger = logging.get_logger(__name__)


class InfoNCELoss(nn.Module):
    r"""
    InfoNCE in both directions (VladVA, section 3.2). The directions are summed without a factor of 1/2, as reported:

        L = mean_k [ -log softmax_j(s · q_k·c_j)[k] - log softmax_j(s · q_j·p_k)[k] ]

    with queries `q`, positives `p`, and candidates `c`, which are the positives followed by the hard negatives. Only
    the first direction uses the hard negatives. In training mode, the loss covers the rows of all processes with exact
    gradients: their average over processes, which DDP computes, is the gradient of one process with the whole batch.
    In eval mode, each process uses its own rows.

    Rows of the same content are not each other's negatives: pairs with equal keys are masked.

    Args:
        matryoshka_dims (`list[int]`, *optional*): Prefix sizes to average the loss over. Each prefix is normalised.

    Citation: Ouali et al., "VladVA: Discriminative Fine-tuning of LVLMs", CVPR 2025; Oord et al., "Representation
    Learning with Contrastive Predictive Coding", 2018.
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
    ) -> dict[str, torch.Tensor]:
        r"""
        Args:
            queries (`torch.FloatTensor` of shape `(n, d)`): Unit vectors.
            positives (`torch.FloatTensor` of shape `(n, d)`): Unit vectors; row `k` matches query `k`.
            inverse_temperature (`torch.FloatTensor` of shape `()`): Inverse temperature `s`.
            negatives (`torch.FloatTensor` of shape `(m, d)`, *optional*): Hard negatives of any of the queries.
            query_keys, positive_keys, negative_keys (`torch.LongTensor`, *optional*): Content keys of the rows.

        Returns:
            `dict` of scalars: `loss` and, detached, `positive_similarity` and `negative_similarity` (mean cosines) and
            `masked_fraction` (of all pairs that are not positives).

        With one query and no negative, every softmax has one term, so the loss is zero and a warning is logged.
        """
        if negatives is None:
            negatives = queries.new_empty(0, queries.shape[1])
        keys = [query_keys, positive_keys, negative_keys]
        if self.training:
            keys = [None if given is None else gather_rows(given) for given in keys]
            queries, positives, negatives = gather_rows(queries), gather_rows(positives), gather_rows(negatives)

        count, candidates = len(queries), torch.cat([positives, negatives])
        if count == 0:
            zero = inverse_temperature * 0.0
            return dict.fromkeys(("loss", "positive_similarity", "negative_similarity", "masked_fraction"), zero)
        if len(candidates) == 1:
            logger.warning_once(
                "A batch has one query and one candidate: there are no negatives, so its contrastive loss is zero. "
                "Raise the batch size, or add hard negatives."
            )
        masked = self._masked_pairs(count, candidates, *keys)
        dims = self.matryoshka_dims or [queries.shape[1]]
        losses = [self._loss(queries, candidates, inverse_temperature, masked, dim) for dim in dims]

        with torch.no_grad():
            similarity = queries @ candidates.T
            others = torch.ones_like(masked).fill_diagonal_(False)
            unmasked = others & ~masked
            return_metrics = {
                "positive_similarity": similarity.diagonal().mean(),
                "negative_similarity": similarity[unmasked].mean() if unmasked.any() else similarity.new_zeros(()),
                "masked_fraction": masked.sum() / others.sum().clamp(min=1),
            }
        return {"loss": torch.stack(losses).mean(), **return_metrics}

    @staticmethod
    def _loss(queries, candidates, inverse_temperature, masked, dim):
        if dim < queries.shape[1]:
            queries, candidates = F.normalize(queries[:, :dim], dim=-1), F.normalize(candidates[:, :dim], dim=-1)
        logits = (inverse_temperature * queries @ candidates.T).masked_fill(masked, -torch.inf)
        labels = torch.arange(len(queries), device=queries.device)
        backward_logits = logits[:, : len(queries)].T
        return F.cross_entropy(logits, labels) + F.cross_entropy(backward_logits, labels)

    @staticmethod
    def _masked_pairs(count, candidates, query_keys, positive_keys, negative_keys):
        """Returns the `(n, n + m)` mask of pairs that are not positives, but have an equal query or candidate."""
        masked = torch.zeros(count, len(candidates), dtype=torch.bool, device=candidates.device)
        if positive_keys is not None:
            masked[:, :count] |= positive_keys[:, None] == positive_keys[None, :]
            if negative_keys is not None:
                masked[:, count:] |= positive_keys[:, None] == negative_keys[None, :]
        if query_keys is not None:
            masked[:, :count] |= query_keys[:, None] == query_keys[None, :]
        masked[:, :count].fill_diagonal_(False)
        return masked
