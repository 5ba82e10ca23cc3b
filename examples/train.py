# /// script
# dependencies = ["hf-unigd[teachers]"]
# ///
"""
Trains a vision-language model with the joint objective, by any of the recipes beside this file. `hf-unigd train` does
the same; copy this script to change more than a recipe can.

VladVA (Ouali et al., CVPR 2025) on one GPU, and on 8 GPUs with the paper's data and batch:

    python examples/train.py --config examples/vladva/llava_1.5_7b_single_gpu.yaml
    accelerate launch --num_processes 8 examples/train.py --config examples/vladva/llava_1.5_7b_8gpu.yaml

Sugar (Chow et al., NeurIPS 2024) on 8 GPUs, with the teachers running during training, or once before it:

    accelerate launch --num_processes 8 examples/train.py --config examples/sugar/llava_1.5_7b.yaml

    hf-unigd embed-slices --config examples/sugar/slice_features.yaml
    accelerate launch --num_processes 8 examples/train.py --config examples/sugar/llava_1.5_7b.yaml \
        --slice_features data/slice_features

A universal embedder on the 20 tasks of MMEB:

    accelerate launch --num_processes 8 examples/train.py --config examples/universal/qwen3_vl_2b_mmeb.yaml

`--resume_from_checkpoint true` continues an interrupted run.
"""

from trl import TrlParser

from hf_unigd.trainer import UniGDModelConfig, UniGDScriptArguments, UniGDTrainer, UniGDTrainingArguments
from hf_unigd.trainer.loading import load_for_training


def main() -> None:
    parser = TrlParser((UniGDScriptArguments, UniGDTrainingArguments, UniGDModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config()

    model, processor, peft_config = load_for_training(model_args, training_args.seed)
    evaluates = training_args.eval_strategy != "no"
    trainer = UniGDTrainer(
        model=model,
        args=training_args,
        train_dataset=script_args.load_train_rows(training_args.seed),
        eval_dataset=script_args.load_eval_rows(training_args.seed) if evaluates else None,
        processing_class=processor,
        peft_config=peft_config,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    if training_args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
