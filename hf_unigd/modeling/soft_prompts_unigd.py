"""The soft prompts of a processor: reserved tokens, whose embeddings are trained, instead of hand-written prompts."""

from typing import Any

from PIL import Image

from .rendering_unigd import SequenceRenderer


class SoftPromptMixin:
    """Adds soft prompts to a processor that has the attributes below."""

    prompts: dict[str, str]
    soft_prompts: Any
    vlm_processor: Any
    tokenizer: Any
    _renderer: SequenceRenderer

    def add_soft_prompts(self) -> dict[str, list[int]]:
        """
        Reserves a token for each token of the hand-written prompts. From now on, the reserved tokens are the prompts.

        Returns:
            `dict[str, list[int]]`: [`soft_prompt_tokens`], the arguments of [`UniGDPreTrainedModel.add_soft_prompts`].

        Raises:
            ValueError: if the processor already has soft prompts.
        """
        if self.soft_prompts is not None:
            raise ValueError(
                "This processor already has soft prompts. New ones would replace them, and what was trained would be "
                "lost."
            )
        self.soft_prompts = {modality: [] for modality in self.prompts}
        for modality in self.prompts:
            # The first token shows where in the rendered text the others will be.
            self._reserve_tokens(modality, 1)
            self._reserve_tokens(modality, len(self._source_ids(modality)))
        return self.soft_prompt_tokens

    def _reserve_tokens(self, modality: str, count: int) -> None:
        tokens = [f"<|unigd_{modality}_{place}|>" for place in range(count)]
        self.tokenizer.add_tokens(tokens, special_tokens=True)
        self.soft_prompts[modality] = tokens
        self._renderer = SequenceRenderer(self.vlm_processor)

    @property
    def soft_prompt_tokens(self) -> dict[str, list[int]]:
        """`token_ids`, the ids of the reserved tokens, and `source_ids`, the ids of the tokens that they replace."""
        source_ids = [token for modality in self.soft_prompts or {} for token in self._source_ids(modality)]
        return {"token_ids": self.soft_prompt_ids, "source_ids": source_ids}

    def _source_ids(self, modality: str) -> list[int]:
        """The tokens of a hand-written prompt in its place. Many tokenizers tokenize the first word of a text in
        another way than the same word after a line break."""
        sequence = Image.new("RGB", (64, 64)) if modality == "image" else "a"
        reserved = self.soft_prompts[modality]
        hard, soft = (
            self.tokenizer(self._renderer.render(0, sequence, prompts={modality: prompt}).prompt)["input_ids"]
            for prompt in (self.prompts[modality], "".join(reserved))
        )
        first, *_, last = self.tokenizer.convert_tokens_to_ids([reserved[0], *reserved])
        before, after = soft[: soft.index(first)], soft[soft.index(last) + 1 :]
        start = _common_length(hard, before)
        end = len(hard) - _common_length(hard[start:][::-1], after[::-1])
        return hard[start:end]

    @property
    def soft_prompt_ids(self) -> list[int]:
        """Ids of the reserved tokens of all modalities, in the order of `soft_prompts`. Empty without soft prompts."""
        tokens = [token for tokens in (self.soft_prompts or {}).values() for token in tokens]
        return self.tokenizer.convert_tokens_to_ids(tokens)

    @property
    def embedding_prompts(self) -> dict[str, str]:
        """The prompts that are in use, by modality: the soft ones if there are any."""
        if not self.soft_prompts:
            return self.prompts
        return {modality: "".join(tokens) for modality, tokens in self.soft_prompts.items()}


def _common_length(a: list[int], b: list[int]) -> int:
    """How many tokens two lists have in common at their beginnings."""
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
