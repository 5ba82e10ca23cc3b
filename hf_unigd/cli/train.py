"""Train a vision-language model with the joint objective: contrastive, structure-inducing and next-token losses."""

from ..inputs import reading
from ..trainer import UniGDModelConfig, UniGDScriptArguments, UniGDTrainer, UniGDTrainingArguments
from ..trainer.loading import load_for_training
from ..trainer.output_folder import check_output_folder
from .parser import CommandParser


def main(argv: list[str]) -> None:
    parser = CommandParser(
        "train", UniGDScriptArguments, UniGDTrainingArguments, UniGDModelConfig, description=__doc__
    )
    script_args, training_args, model_args = parser.parse(argv)

    if training_args.resume_from_checkpoint is None and training_args.should_save:
        check_output_folder(training_args.output_dir)  # hours before the trainer does
    with reading(model_args.model_name_or_path):
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
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
