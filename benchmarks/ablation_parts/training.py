"""Trains an arm with UniGDTrainer: what all arms have in common."""

import tempfile
from typing import Any

from peft import LoraConfig
from transformers import Trainer

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor, UniGDTrainer, UniGDTrainingArguments
from hf_unigd.evaluation.embedders import Embedder, ModelEmbedder
from hf_unigd.quickstart.training import fast_matrix_products


EVALUATION_BATCH_SIZE = 125
LORA = {"r": 16, "lora_alpha": 16}
# What measures an arm, and the losses that were logged.
Trained = tuple[Embedder, list[dict[str, float]]]


def tune_model(
    model: UniGDForConditionalGeneration,
    processor: UniGDProcessor,
    rows: Any,
    seed: int,
    learning_rate: float,
    steps: int,
    batch_size: int,
    lora: bool = True,
    **objective: Any,
) -> Trained:
    """
    Trains an adapter, and merges it into the model.

    Args:
        model, processor: What is trained. The vision tower and its projector are frozen.
        rows: Rows of any accepted format.
        seed: Seed of the adapter's weights and of the order of the rows.
        learning_rate: Learning rate of AdamW, with a warm-up of a tenth of the steps and a cosine.
        steps: Number of steps.
        batch_size: Rows per step.
        lora: Whether to train LoRA: rank 16, alpha 16, on all linear layers of the language model.
        objective: Training arguments in which arms differ.

    Returns:
        The model, into which the adapter is merged, and the losses that were logged.
    """
    with tempfile.TemporaryDirectory() as output:
        trainer = UniGDTrainer(
            model,
            UniGDTrainingArguments(
                output_dir=output,
                max_steps=steps,
                per_device_train_batch_size=batch_size,
                learning_rate=learning_rate,
                warmup_steps=0.1,
                trust_caption_columns=True,  # a long caption of a scene is three short sentences
                check_rows="off",  # the rows are drawn in code
                seed=seed,
                save_strategy="no",
                logging_steps=max(1, steps // 10),
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
                **objective,
            ),
            train_dataset=rows,
            processing_class=processor,
            peft_config=LoraConfig(**LORA, target_modules=None if lora else []),
        )
        with fast_matrix_products():
            trainer.train()
    return as_embedder(trainer.model.merge_and_unload(), processor), logged_losses(trainer)


def logged_losses(trainer: Trainer) -> list[dict[str, float]]:
    """The losses that a trainer has logged, with their steps."""
    return [
        {name: round(value, 5) for name, value in each.items() if name == "step" or name.endswith("loss")}
        for each in trainer.state.log_history
        if "learning_rate" in each
    ]


def as_embedder(model: UniGDForConditionalGeneration, processor: UniGDProcessor) -> ModelEmbedder:
    return ModelEmbedder(model, processor, "arm", EVALUATION_BATCH_SIZE)
