"""sentence-transformers on the base model: the same rows, adapter, batch and steps, and its own trainer and loss."""

import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

from hf_unigd.evaluation.embedders import SentenceEmbedder
from hf_unigd.hub import export_checkpoint
from hf_unigd.quickstart.training import fast_matrix_products

from . import vladva
from .arms import SentenceArm
from .corpus import scenes
from .measuring import measure, validate
from .training import EVALUATION_BATCH_SIZE, LORA, Trained, logged_losses


__all__ = ["measure", "settings", "train", "validate"]


def settings(arm: SentenceArm, folder: Path) -> dict[str, Any]:
    return {"prompt": vladva.best_prompt(folder), "steps": vladva.STEPS, "batch_size": vladva.BATCH_SIZE}


def load(folder: Path, prompt: str) -> SentenceEmbedder:
    """The base model as one of sentence-transformers, which gives the embeddings of `vladva.load`."""
    with tempfile.TemporaryDirectory() as temporary:
        model, model.processor = vladva.load(folder, prompt)
        model.save_pretrained(f"{temporary}/ours")
        export_checkpoint(f"{temporary}/ours", f"{temporary}/exported")
        return SentenceEmbedder(f"{temporary}/exported", EVALUATION_BATCH_SIZE)


def train(arm: SentenceArm, seed: int, learning_rate: float, folder: Path, rows: Any = None, **given: Any) -> Trained:
    """Trains LoRA from a base model, as `vladva.train` does, with the cached loss of sentence-transformers in both
    directions and its own temperature."""
    chosen = given or settings(arm, folder)
    embedder = load(folder, chosen["prompt"])
    shown = (scenes("train") if rows is None else rows)[:]
    loss = CachedMultipleNegativesRankingLoss(
        embedder.model,
        mini_batch_size=chosen["batch_size"],
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    embedder.model.add_adapter(LoraConfig(**LORA, target_modules=r".*language_model.*_proj"))
    with tempfile.TemporaryDirectory() as output:
        trainer = SentenceTransformerTrainer(
            embedder.model,
            SentenceTransformerTrainingArguments(
                output_dir=output,
                max_steps=chosen["steps"],
                per_device_train_batch_size=chosen["batch_size"],
                learning_rate=learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=0.1,
                seed=seed,
                save_strategy="no",
                logging_steps=max(1, chosen["steps"] // 10),
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=Dataset.from_dict({"anchor": shown["image"], "positive": shown["short_caption"]}),
            loss=loss,
        )
        with fast_matrix_products():
            trainer.train()
    return embedder, logged_losses(trainer)
