"""How long sequences will be, without tokenizing them or touching a pixel; sampling by it."""

from collections.abc import Sequence

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..data.example import Messages
from ..modeling import UniGDProcessor


CHARACTERS_PER_TOKEN = 4


def sequence_length(processor: UniGDProcessor, messages: Messages, target: str | None = None) -> int:
    """About how many tokens a sequence and its target have: the image tokens exactly, texts by their characters."""
    parts = [part for turn in messages for part in turn["content"]]
    characters = sum(len(part["text"]) for part in parts if part["type"] == "text") + len(target or "")
    sizes = [(part["image"].height, part["image"].width) for part in parts if part["type"] == "image"]
    counts = processor.vlm_processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens if sizes else []
    return characters // CHARACTERS_PER_TOKEN + sum(counts)


class EpochLengthGroupedSampler(LengthGroupedSampler):
    """Batches of examples of about the same length; its order depends on the seed and the epoch alone, so that all
    processes agree on it and a resumed run goes on in it."""

    def __init__(self, batch_size: int, lengths: Sequence[int], seed: int):
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()
