# /// script
# dependencies = ["hf-unigd"]
# ///
"""
Trains VladVA (Ouali et al., CVPR 2025): the contrastive loss on short captions and next-token prediction on long
captions, with soft prompts and LoRA.

On one GPU:

    python examples/vladva/train_vladva.py --config examples/vladva/llava_1.5_7b_single_gpu.yaml

The paper's setting, on 32 GPUs in 4 nodes:

    accelerate launch --num_machines 4 --num_processes 32 \
        examples/vladva/train_vladva.py --config examples/vladva/llava_1.5_7b.yaml

Each dataset under `datasets:` is a Hub id or a folder. Rows have `image` and `short_caption`, `long_caption` or both.
The `txt` of CC3M, beside `jpg`, is a short caption, and the answer in ShareGPT-4V's `conversations` is a long caption.
"""

from datasets import DatasetDict
from trl import DatasetMixtureConfig, TrlParser, get_dataset

from hf_unigd.trainer import UniGDModelConfig, UniGDTrainer, UniGDTrainingArguments
from hf_unigd.trainer.loading import load_for_training


def vladva_columns(row: dict) -> dict:
    """Returns `image`, `short_caption` and `long_caption` (or None) of a row of CC3M, OpenImages or ShareGPT-4V."""
    conversation = row.get("conversations") or []
    answers = [turn["value"] for turn in conversation if turn["from"] == "gpt"]
    return {
        "image": row.get("image") or row.get("jpg"),
        "short_caption": row.get("short_caption") or row.get("txt"),
        "long_caption": row.get("long_caption") or (answers[0] if answers else None),
    }


def main() -> None:
    parser = TrlParser((DatasetMixtureConfig, UniGDTrainingArguments, UniGDModelConfig))
    dataset_args, training_args, model_args = parser.parse_args_and_config()

    splits: DatasetDict = get_dataset(dataset_args)
    keep = ("image", "short_caption", "long_caption")
    splits = splits.map(vladva_columns)
    splits = splits.remove_columns([name for name in splits["train"].column_names if name not in keep])

    model, processor, peft_config = load_for_training(model_args, training_args.seed)
    trainer = UniGDTrainer(
        model=model,
        args=training_args,
        train_dataset=splits["train"],
        eval_dataset=splits.get("test"),
        processing_class=processor,
        peft_config=peft_config,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    if training_args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
