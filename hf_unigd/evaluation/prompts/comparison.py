"""Compares prompts by what a model makes of the same images and captions with each of them."""

from dataclasses import dataclass

import torch

from ...modeling import UniGDForConditionalGeneration
from .items import CaptionedImages
from .lists import MODALITIES, SOFT_PROMPT
from .statistics import PairRecalls, cumulative_variance, pair_recalls
from .summaries import Summaries


@dataclass
class PromptComparison:
    """
    Attributes:
        names: The prompts of each modality.
        entropies: By modality and prompt, the entropies of all images or captions, in nats.
        curves: By modality and prompt, what [`cumulative_variance`] returns.
        probabilities: By modality and prompt, the mean next-token distribution at the summary token.
        pairs: The recall of every pair of an image prompt and a text prompt.
    """

    names: dict[str, list[str]]
    entropies: dict[str, dict[str, torch.Tensor]]
    curves: dict[str, dict[str, torch.Tensor]]
    probabilities: dict[str, dict[str, torch.Tensor]]
    pairs: PairRecalls

    @classmethod
    def of(
        cls,
        names: dict[str, list[str]],
        summaries: dict[str, Summaries],
        items: CaptionedImages,
        model: UniGDForConditionalGeneration,
        show_progress: bool = True,
    ) -> "PromptComparison":
        """
        Args:
            names: The prompts of each modality.
            summaries: What the model made of the images and captions, by modality, with the prompts in this order.
            items: The images and captions.
            model: The model, on whose device similarities are computed.
            show_progress: Whether to draw progress bars.
        """
        image, text = (summaries[modality] for modality in MODALITIES)
        pairs = pair_recalls(
            image.embeddings[:, items.side("image").items],
            text.embeddings[:, items.side("text").items],
            items.matches,
            model.device,
            show_progress,
        )

        def by_prompt(values):
            return {modality: dict(zip(names[modality], values(modality), strict=True)) for modality in MODALITIES}

        return cls(
            names,
            by_prompt(lambda modality: summaries[modality].entropies),
            by_prompt(lambda modality: map(cumulative_variance, summaries[modality].embeddings)),
            by_prompt(lambda modality: summaries[modality].probabilities),
            pairs,
        )

    @property
    def pair_entropies(self) -> torch.Tensor:
        """The mean of the two entropies of each pair, of shape `(num_image_prompts, num_text_prompts)`."""
        image, text = (
            torch.stack([values.mean() for values in self.entropies[modality].values()]) for modality in MODALITIES
        )
        return (image[:, None] + text[None]) / 2

    def best(self, hand_written: bool = False) -> tuple[int, int]:
        """
        The places of the best pair of prompts. A soft prompt is not paired with a hand-written one, because a model
        has either.

        Args:
            hand_written: Whether to choose among hand-written prompts alone.
        """
        image, text = (torch.tensor([name == SOFT_PROMPT for name in self.names[modality]]) for modality in MODALITIES)
        allowed = image[:, None] == text[None]
        if hand_written:
            allowed &= ~image[:, None]
        return self.pairs.best(self.pair_entropies, allowed)

    def pair(self, places: tuple[int, int]) -> dict[str, str]:
        """The prompts of a pair by modality."""
        return {modality: self.names[modality][place] for modality, place in zip(MODALITIES, places, strict=True)}

    def score(self, places: tuple[int, int]) -> tuple[float, float]:
        """Mean recall, from 0 to 1, and entropy, in nats, of a pair."""
        return float(self.pairs.means[places]), float(self.pair_entropies[places])
