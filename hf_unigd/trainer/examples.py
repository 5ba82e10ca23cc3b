"""Turns the rows that a trainer is given into examples."""

from datasets import IterableDataset

from ..data import (
    Example,
    ExampleCheck,
    ExampleDataset,
    IterableExampleDataset,
    RowParser,
    SliceFeatures,
    make_examples,
)
from ..data.dataset import Rows
from ..data.lengths import sequence_length
from ..modeling import UniGDProcessor
from .arguments import UniGDTrainingArguments
from .collator import UniGDDataCollator


def prepare_examples(
    rows: Rows,
    processor: UniGDProcessor,
    args: UniGDTrainingArguments,
    collator: UniGDDataCollator,
    slice_features: SliceFeatures | None,
    is_training: bool,
) -> ExampleDataset | IterableExampleDataset:
    """
    Turns rows of any accepted format into examples, and checks that `collator` can process them. Examples are returned
    as they are.

    Args:
        rows: The rows.
        processor: The processor.
        args: The training arguments.
        collator: The collator of the training examples.
        slice_features: Teacher features of the slices of the rows.
        is_training: Whether to train on the rows. If not, they are evaluated, with every loss and in their order.

    Raises:
        TypeError, ValueError: the rows are of another kind, or have no accepted format.
        RowError: a row is bad and `skip_bad_rows` is off.
    """
    parser = RowParser(
        lambda text: len(processor.tokenizer(text, add_special_tokens=False)["input_ids"]),
        # Without the contrastive loss, every `caption` is a target, because a positive would not be trained on.
        short_caption_max_tokens=args.short_caption_max_tokens if args.contrastive_weight else 0,
        long_caption_max_tokens=args.long_caption_max_tokens,
        image_folder=args.image_folder,
        max_image_pixels=args.max_image_pixels,
        splitter=args.splitter if args.alignment_weight else None,
        find_reserved=processor.find_reserved,
        seed=args.seed,
    )

    def length_of(example: Example) -> int:
        return sequence_length(processor, example.anchor, example.target)

    if is_training and isinstance(rows, IterableDataset) and args.shuffle_buffer_size:
        seed = args.seed if args.data_seed is None else args.data_seed
        rows = rows.shuffle(seed, buffer_size=args.shuffle_buffer_size)
    by_length = is_training and args.train_sampling_strategy == "group_by_length"
    return make_examples(
        rows,
        parser,
        args.skip_bad_rows,
        args.check_rows,
        slice_features,
        length_of if by_length else None,
        ExampleCheck(
            processor,
            collator.max_length,
            # The structure loss reads targets even if no next-token loss does.
            causal_lm=collator.causal_lm or bool(args.alignment_weight) or not is_training,
            contrastive=collator.contrastive or not is_training,
        ),
    )
