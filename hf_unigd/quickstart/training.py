"""The trainer of all recipes, and how it is run."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..modeling import UniGDForConditionalGeneration, UniGDProcessor
from ..trainer import UniGDTrainer, UniGDTrainingArguments
from .arguments import QuickstartArguments
from .muon import MuonWithAdamW


def make_trainer(
    args: QuickstartArguments,
    model: UniGDForConditionalGeneration,
    processor: UniGDProcessor,
    train,
    test,
    optimizer: torch.optim.Optimizer | None = None,
    **recipe,
) -> UniGDTrainer:
    """A trainer with the training arguments of all recipes and, as keyword arguments, those of one. The optimizer is
    [`MuonWithAdamW`] by default."""
    training_args = UniGDTrainingArguments(
        output_dir=str(args.folder),
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        warmup_steps=20,
        freeze_vision_tower=False,  # the projector is new and must be trained, even to a tower that is frozen
        check_rows="off",  # the rows are drawn in code
        trust_caption_columns=True,  # their long captions are short sentences
        dataloader_num_workers=1,  # draws the next rows while a step runs
        dataloader_pin_memory=torch.accelerator.is_available(),
        seed=args.seed,
        save_strategy="no",
        report_to=[],
        **recipe,
    )
    return UniGDTrainer(
        model,
        training_args,
        train_dataset=train,
        eval_dataset=test,
        processing_class=processor,
        optimizers=(optimizer or MuonWithAdamW(model), None),
    )


@contextmanager
def fast_matrix_products() -> Iterator[None]:
    """
    Multiplies float32 matrices in bfloat16, with sums in float32, where the processor has instructions for that. It is
    for training: what is measured keeps its precision.

    Attention is then not torch's fused one, whose products, of one row and one head each, are too small for that.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
