"""`hf-unigd embed`: embeds the anchors of a dataset and saves them as a searchable folder."""

from dataclasses import dataclass, field

from datasets import Dataset, Features, Image, Sequence, Value
from trl import TrlParser

from ..data import RowParser, make_examples
from ..hub import load_checkpoint
from ..retrieval import EmbeddingIndex, embed_sequences
from ..trainer import UniGDScriptArguments
from .inference import InferenceArguments


@dataclass
class EmbedArguments(InferenceArguments):
    output: str = field(default="index", metadata={"help": "Folder to write."})
    skip_bad_rows: bool = field(default=False, metadata={"help": "Skip bad rows, counted in the log."})


def main(argv: list[str]) -> None:
    parser = TrlParser((EmbedArguments, UniGDScriptArguments), prog="hf-unigd embed")
    args, script_args = parser.parse_args_and_config(argv)
    model, processor = load_checkpoint(args.model, **args.model_kwargs())
    rows = script_args.load_rows(script_args.dataset_test_split)
    row_parser = RowParser(lambda text: len(processor.tokenizer(text)["input_ids"]), image_folder=args.image_folder)
    examples = list(make_examples(rows, row_parser, args.skip_bad_rows, check_rows=args.skip_bad_rows))

    embeddings = embed_sequences(model.to(args.device()), processor, [e.anchor for e in examples], args.batch_size)
    shown = [_shown(example) for example in examples]
    features = {
        "row": Value("int64"),
        "text": Value("string"),
        "image": Image(),
        "embedding": Sequence(Value("float32"), length=embeddings.shape[1]),
    }
    index = Dataset.from_list(
        [{**entry, "embedding": vector} for entry, vector in zip(shown, embeddings.numpy(), strict=True)],
        features=Features(features),
    )
    EmbeddingIndex(index, args.model).save(args.output)
    print(f"{len(index)} embeddings of width {embeddings.shape[1]} in {args.output}")


def _shown(example) -> dict:
    """What a person is shown of a row: its first picture, and its own text or that of its match."""
    parts = [part for turn in example.anchor for part in turn["content"]]
    images = [part["image"] for part in parts if part["type"] == "image"]
    texts = [part["text"] for part in parts if part["type"] == "text"]
    if not texts and example.positive is not None:
        texts = [part["text"] for turn in example.positive for part in turn["content"] if part["type"] == "text"]
    return {"row": example.row, "text": " ".join(texts), "image": images[0] if images else None}
