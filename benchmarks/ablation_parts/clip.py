"""Two towers of the base model's size, trained from scratch."""

import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import LlavaConfig, LlavaProcessor

from hf_unigd.evaluation.embedders import SentenceEmbedder
from hf_unigd.quickstart.small_clip import build_clip, train_clip
from hf_unigd.quickstart.training import fast_matrix_products

from . import base, vladva
from .arms import ClipArm
from .corpus import scenes
from .measuring import measure, validate
from .training import EVALUATION_BATCH_SIZE, Trained


__all__ = ["measure", "settings", "train", "validate"]

LAYERS = 4  # of the tower of pictures; that of texts has two
TUNING_STEPS, BATCH_SIZE = vladva.STEPS, vladva.BATCH_SIZE


def settings(arm: ClipArm, folder: Path) -> dict[str, Any]:
    pretraining = json.loads((folder / base.FACTS).read_text(encoding="utf-8"))["steps"] if arm.like_pretraining else 0
    return {"steps": pretraining + TUNING_STEPS * arm.like_tuning, "batch_size": BATCH_SIZE}


def train(arm: ClipArm, seed: int, learning_rate: float, folder: Path) -> Trained:
    """Trains two towers on captioned scenes. The base model of `folder` gives the sizes, and its tokenizer."""
    processor = LlavaProcessor.from_pretrained(folder)
    width = LlavaConfig.from_pretrained(folder).text_config.hidden_size
    model, clip_processor = build_clip(processor, width, LAYERS, seed)
    rows = scenes("train")[:]
    pairs = [(image, [caption]) for image, caption in zip(rows["image"], rows["short_caption"], strict=True)]
    with fast_matrix_products():
        train_clip(model, clip_processor, pairs, settings(arm, folder)["steps"], BATCH_SIZE, learning_rate, seed)
    with tempfile.TemporaryDirectory() as output:
        model.save_pretrained(output)
        clip_processor.save_pretrained(output)
        return SentenceEmbedder(output, EVALUATION_BATCH_SIZE), []
