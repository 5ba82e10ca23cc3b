"""Numbers by which prompts are compared: the variance of their embeddings, and the recall of their pairs."""

from dataclasses import dataclass

import torch
from tqdm.auto import tqdm


KS = (1, 5, 10)
MAX_SIMILARITIES = 1 << 24  # how many are in memory at once: 64 MB in float32


def cumulative_variance(embeddings: torch.Tensor) -> torch.Tensor:
    """
    The share of the variance of embeddings that their first principal components have (VladVA, figure 3).

    Args:
        embeddings (`torch.FloatTensor` of shape `(n, d)`).

    Returns:
        `torch.DoubleTensor` of shape `(min(n, d),)`: for `k = 1, 2, ...`, the share of the first `k` components. It is
        1 everywhere if all embeddings are equal.
    """
    centred = embeddings.double() - embeddings.double().mean(0)
    n, d = centred.shape
    # The eigenvalues of the smaller of the two Gram matrices are the squared singular values.
    gram = centred @ centred.T if n < d else centred.T @ centred
    variances = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
    total = variances.sum()
    return (variances / total).cumsum(0) if total > 0 else torch.ones_like(variances)


def components_for(curve: torch.Tensor, share: float) -> int:
    """How many components have the `share` of the variance, of a curve of [`cumulative_variance`]."""
    return min(int((curve < share).sum()) + 1, len(curve))


@dataclass(frozen=True)
class PairRecalls:
    """
    Zero-shot recall of every pair of an image prompt and a text prompt (VladVA, figure 5).

    Attributes:
        recalls (`torch.DoubleTensor` of shape `(num_image_prompts, num_text_prompts, 2, len(KS))`): From images to
            texts and from texts to images, at each of [`KS`], between 0 and 1.
    """

    recalls: torch.Tensor

    @property
    def means(self) -> torch.Tensor:
        """The mean of both directions and all k, of shape `(num_image_prompts, num_text_prompts)`."""
        return self.recalls.mean((2, 3))

    def best(self, entropies: torch.Tensor, allowed: torch.Tensor) -> tuple[int, int]:
        """
        The pair with the highest mean recall, and among equals that with the highest entropy.

        Args:
            entropies (`torch.FloatTensor` of shape `(num_image_prompts, num_text_prompts)`): Mean entropies of pairs.
            allowed (`torch.BoolTensor` of the same shape): Pairs to choose from.
        """
        means = self.means.masked_fill(~allowed, -torch.inf)
        tied = torch.where(means == means.max(), entropies.double(), -torch.inf)
        image, text = divmod(int(tied.argmax()), means.shape[1])
        return image, text


def pair_recalls(
    images: torch.Tensor,
    texts: torch.Tensor,
    matches: torch.Tensor,
    device: torch.device | str = "cpu",
    show_progress: bool = True,
) -> PairRecalls:
    """
    Recall of all pairs of prompts, from the embeddings of each prompt alone. Between a match and what is equally
    similar, the match comes last, so that embeddings that are all alike find nothing.

    Args:
        images (`torch.FloatTensor` of shape `(num_image_prompts, n, d)`): Unit vectors of images.
        texts (`torch.FloatTensor` of shape `(num_text_prompts, m, d)`): Unit vectors of captions.
        matches (`torch.BoolTensor` of shape `(n, m)`): Which belong together. Every image and every caption has a
            match.
        device: Where similarities are computed.
        show_progress: Whether to draw a progress bar.
    """
    texts, matches = texts.to(device), matches.to(device)
    recalls = torch.zeros(len(images), len(texts), 2, len(KS), dtype=torch.double)
    at_once = max(1, MAX_SIMILARITIES // matches.numel())
    for a, image in enumerate(tqdm(images, desc="Pairs of prompts", unit="prompt", disable=not show_progress)):
        found = []
        for some in texts.split(at_once):
            similarities = image.to(device) @ some.mT
            both = ((similarities, matches), (similarities.mT, matches.T))
            found.append(torch.stack([_recall(scores, relevant) for scores, relevant in both], dim=1))
        recalls[a] = torch.cat(found).cpu()
    return PairRecalls(recalls)


def _recall(scores: torch.Tensor, relevant: torch.Tensor) -> torch.Tensor:
    """Recall at each of [`KS`], of shape `(num_prompts, len(KS))`, of scores of shape `(num_prompts, n, m)`."""
    best = scores.masked_fill(~relevant, -torch.inf).amax(-1, keepdim=True)
    ranks = ((scores >= best) & ~relevant).sum(-1)
    return torch.stack([(ranks < k).double().mean(-1) for k in KS], dim=-1)


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Pearson's correlation of two tensors of the same shape, NaN if one of them is constant."""
    return float(torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1])
