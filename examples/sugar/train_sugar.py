# /// script
# dependencies = ["hf-unigd[teachers]"]
# ///
"""
Trains Sugar (Chow et al., NeurIPS 2024): the structure loss, which regresses similarities of hidden states onto an
alignment kernel, and next-token prediction.

On 8 GPUs, with the teachers running during training:

    accelerate launch --num_processes 8 \
        examples/sugar/train_sugar.py --config examples/sugar/llava_1.5_7b.yaml

To run the teachers only once, save the rows and compute the features of their slices before training:

    python examples/sugar/train_sugar.py --config examples/sugar/llava_1.5_7b.yaml --save_rows data/rows
    hf-unigd embed-slices --model llava-hf/llava-1.5-7b-hf --dataset_name data/rows \
        --image_folder data/images --skip_bad_rows true --output data/slice_features
    accelerate launch --num_processes 8 \
        examples/sugar/train_sugar.py --config examples/sugar/llava_1.5_7b.yaml --slice_features data/slice_features

Each entry under `datasets:` holds arguments of `datasets.load_dataset`. Its rows are those of MMC4, COYO or LLaVA,
recognised by their columns. Image files are read from `image_folder`.
"""

from dataclasses import dataclass, field

from datasets import Dataset, Features, Image, List, Value, concatenate_datasets, load_dataset
from trl import TrlParser

from hf_unigd.trainer import UniGDModelConfig, UniGDTrainer, UniGDTrainingArguments
from hf_unigd.trainer.loading import load_for_training


CHAT = Features(
    {
        "messages": List(
            {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
        ),
        "images": List({"bytes": Value("binary"), "path": Value("string")}),
    }
)


@dataclass
class DataArguments:
    datasets: list[dict] = field(
        default_factory=list, metadata={"help": "Arguments of `load_dataset` for each dataset, in the YAML file."}
    )
    save_rows: str | None = field(
        default=None, metadata={"help": "Save the rows to this folder, for `hf-unigd embed-slices`, and stop."}
    )


def from_mmc4(row: dict) -> dict:
    """Converts an article, with each image before its matched text. Without an answer, it has no next-token loss."""
    images = sorted(row["image_info"], key=lambda image: image["matched_text_index"])
    parts = []
    for place, text in enumerate(row["text_list"]):
        parts += [{"type": "image", "text": None} for image in images if image["matched_text_index"] == place]
        parts.append({"type": "text", "text": text})
    return _user_turn(parts, [{"bytes": None, "path": image["image_name"]} for image in images])


def from_coyo(row: dict) -> dict:
    """Converts an image and its text from the web. Without an answer, it has no next-token loss."""
    return _user_turn([{"type": "image", "text": None}, {"type": "text", "text": row["text"]}], [row["image"]])


def _user_turn(parts: list[dict], images: list[dict]) -> dict:
    return {"messages": [{"role": "user", "content": parts}], "images": images}


def sugar_rows(rows: Dataset) -> Dataset:
    """Converts rows of MMC4 and COYO to chats of one user turn. hf-unigd accepts the rows of LLaVA as they are."""
    columns = rows.column_names
    if "conversations" in columns:
        return rows.select_columns([name for name in ("conversations", "image") if name in columns])
    if {"text_list", "image_info"} <= set(columns):
        return rows.map(from_mmc4, features=CHAT, remove_columns=columns)
    if {"image", "text"} <= set(columns):
        rows = rows.cast_column("image", Image(decode=False))  # its bytes or its path
        return rows.map(from_coyo, features=CHAT, remove_columns=columns)
    raise ValueError(
        f"The columns {columns} are not those of MMC4 (text_list, image_info), COYO (image, text) or LLaVA "
        "(conversations, image)."
    )


def main() -> None:
    parser = TrlParser((DataArguments, UniGDTrainingArguments, UniGDModelConfig))
    data_args, training_args, model_args = parser.parse_args_and_config()

    with training_args.main_process_first(desc="reading the rows"):
        parts = [sugar_rows(load_dataset(**{"split": "train", **part})) for part in data_args.datasets]
        rows = concatenate_datasets(parts)
    if data_args.save_rows:
        rows.save_to_disk(data_args.save_rows)
        return

    model, processor, peft_config = load_for_training(model_args, training_args.seed)
    trainer = UniGDTrainer(
        model=model,
        args=training_args,
        train_dataset=rows,
        processing_class=processor,
        peft_config=peft_config,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    if training_args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
