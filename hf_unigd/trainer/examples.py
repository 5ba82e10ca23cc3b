"""Turns the rows that a trainer is given into examples."""

from typing import Any

from datasets import Dataset, IterableDataset

from ..data import (
    DatasetMixture,
    Example,
    ExampleCheck,
    ExampleDataset,
    ExampleStream,
    MixedDataset,
    MixedStream,
    RowParser,
    SliceFeatures,
    make_examples,
)
from ..data.dataset import Rows
from ..data.lengths import TokenCounter, sequence_length
from ..modeling import UniGDProcessor
from ..modeling.instructions_unigd import check_instructions
from .arguments import UniGDTrainingArguments
from .collator import UniGDDataCollator


SHARDS_PER_WORKER = 8  # of a map-style dataset that is read as a stream


def prepare_examples(
    rows: Rows | DatasetMixture,
    processor: UniGDProcessor,
    args: UniGDTrainingArguments,
    collator: UniGDDataCollator,
    slice_features: SliceFeatures | None,
    is_training: bool,
) -> ExampleDataset | MixedDataset | ExampleStream:
    """
    Turns rows of any accepted format into examples, and checks that `collator` can process them. Examples are returned
    as they are. A mixture with a stream in it becomes a stream.

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
    if isinstance(rows, (ExampleDataset, MixedDataset, ExampleStream)):
        return rows
    parser = RowParser(
        TokenCounter(processor.tokenizer),
        # Without the contrastive loss, every `caption` is a target, because a positive would not be trained on.
        short_caption_max_tokens=args.short_caption_max_tokens if args.contrastive_weight else 0,
        long_caption_max_tokens=args.long_caption_max_tokens,
        match_every_caption=not is_training,
        trust_caption_columns=args.trust_caption_columns,
        image_folder=args.image_folder,
        max_image_pixels=args.max_image_pixels,
        splitter=args.splitter if args.alignment_weight else None,
        mask_history=args.mask_history,
        find_reserved=processor.find_reserved,
        instruction=processor.get_instruction("query"),
        document_instruction=processor.get_instruction("document"),
        seed=args.seed,
    )

    def length_of(example: Example) -> int:
        return sequence_length(processor, example.anchor, example.target)

    def examples_of(rows: Any, parser: RowParser, slice_features: SliceFeatures | None) -> Any:
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
            num_workers=args.dataloader_num_workers,
            shuffle_buffer_size=args.shuffle_buffer_size if is_training else 0,
            seed=seed,
        )

    seed = args.seed if args.data_seed is None else args.data_seed
    if not isinstance(rows, DatasetMixture):
        return examples_of(rows, parser, slice_features)
    if is_training:
        _save_instructions(rows, processor)
    has_stream = any(isinstance(source.rows, IterableDataset) for source in rows.sources)
    parts: list[Any] = []
    first = 0
    for source in rows.sources:
        own_rows: Any = _as_stream(source.rows, source.name, args) if has_stream else source.rows
        own_features = slice_features
        if slice_features is not None and not has_stream:
            own_features = slice_features.part(first, len(own_rows))
            first += len(own_rows)
        try:
            parts.append(examples_of(own_rows, source.parser(parser), own_features))
        except (TypeError, ValueError) as error:
            if source.name in str(error):
                raise
            raise type(error)(f"{source.name}: {error}") from error
    if has_stream:
        together = args.gradient_accumulation_steps if args.negatives_across_accumulation else 1
        return MixedStream(parts, rows.weights or [1.0] * len(parts), seed, together if args.batch_by_source else None)
    return MixedDataset(parts, rows.weights if is_training else None, seed)


def _save_instructions(rows: DatasetMixture, processor: UniGDProcessor) -> None:
    """Keeps the instructions of the datasets in the processor, by their names."""
    given = {
        name: text
        for source in rows.sources
        for name, text in (
            (source.name, source.instruction),
            (f"{source.name} document", source.document_instruction),
        )
        if text is not None
    }
    processor.instructions = check_instructions({**processor.instructions, **given}, processor.find_reserved)


def _as_stream(rows: Rows, name: str, args: UniGDTrainingArguments) -> IterableDataset:
    """The rows of one dataset of a mixture in which another is a stream."""
    if isinstance(rows, IterableDataset):
        return rows
    if not isinstance(rows, Dataset):
        raise TypeError(
            f"{name}: a mixture with a stream in it takes `datasets` datasets, got {type(rows).__name__}. "
            "`datasets.Dataset.from_list` makes one of a list."
        )
    shards = args.world_size * max(1, args.dataloader_num_workers) * SHARDS_PER_WORKER
    return rows.to_iterable_dataset(num_shards=min(shards, len(rows)))
