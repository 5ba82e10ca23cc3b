"""Collates examples into batches of chunks. A chunk is the input of one forward pass."""

import copy
import json
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import get_worker_info

from ..data import Example, RowError
from ..data.example import InputSequence, Messages, content_key, image_key, iter_image_parts
from ..data.lengths import sequence_length
from ..data.slices import SentenceSplitter
from ..data.streams import Skipped
from ..evaluation.items import items_of
from ..modeling import SequenceError, UniGDProcessor
from ..modeling.instructions_unigd import without_instruction
from .arguments import UniGDTrainingArguments
from .batches import idle_batch
from .prefixes import PrefixSampler
from .stored_images import StoredImages


logger = logging.getLogger(__name__)

_TURN = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
# Takes the place of a batch of bad rows, as every process takes part in every forward pass.
_BLANK = Example(row=0, anchor=_TURN, positive=_TURN)


@dataclass
class UniGDDataCollator:
    """
    Collates examples for [`UniGDTrainer`].

    A call takes a list of examples, in which `None` stands for a row that was skipped before. A batch of bad rows
    becomes one without rows, from which nothing is learned. It returns a `dict`:

    - `chunks`: a list of model inputs, each with its own padding, the `spans` to embed and `labels`. The first chunks
      hold the anchors with their targets, the others the candidates: the positives of the embedded anchors, and the
      negatives. A chat that is answered, and embedded at a prompt, is two sequences: no answer follows the prompt.
    - `places`: a `dict` of the indices of the `anchors` `(n,)`, their `positives` `(n,)`, the `negatives` `(m,)` and,
      for the structure loss, the `slices` in the concatenated embeddings of all chunks.
    - `anchor_rows` `(n,)`: indices of the rows of the embedded anchors in the dataset.
    - `anchor_keys`, `positive_keys` `(n,)`, `negative_keys` `(m,)`: content keys that mask duplicates. An instruction
      is part of a question, and not of its answer: only anchors of equal instructions have equal keys.
    - `anchor_items`, `positive_items` `(n, 2)`, if `with_items`: for each of them, the key of the item that it is of
      ([`~hf_unigd.evaluation.items.items_of`]), and that of its content.
    - `caption_keys` `(k, 2)`: content keys of images and of their captions, which mask what matches besides.
    - `structure`, if every example has slices: the inputs of [`StructureLoss`] that [`PrefixSampler`] returns.
    - `rows` `(batch_size,)`: indices of the rows in the dataset.
    - `position`, of a stream: JSON of the worker's number and of its position after the last example.

    A batch of [`~hf_unigd.data.streams.Skipped`] examples, which were used before the run was resumed, is empty.

    Args:
        processor: Turns sequences into model inputs.
        max_length: Maximum number of tokens in a row. A longer row is a bad row.
        skip_bad_rows: Whether to skip bad rows and log their reasons instead of raising an error.
        splitter: Splits the texts of examples with slices into sentences.
        prefixes: Chooses the positions of the structure loss in examples with slices.
        chunk_size: Number of rows per chunk; rows of similar lengths share a chunk. By default, one chunk holds all
            anchors and another all candidates.
        contrastive: Whether anchors are embedded and contrasted.
        causal_lm: Whether targets are labelled. If not, they are only read if the example has slices.
        with_items: Whether a batch says which items of retrieval its anchors and positives are.
        with_image_keys: Whether chunks get the `image_keys` of their images
            ([`~hf_unigd.data.example.image_key`]), with their numbers of tokens.
        stored_images: Makes the chunks whose images are all in the vision cache. They have no `pixel_values`.

    Raises:
        RowError: a row cannot be processed and `skip_bad_rows` is off.
    """

    processor: UniGDProcessor
    max_length: int | None = None
    skip_bad_rows: bool = False
    splitter: SentenceSplitter | None = None
    prefixes: PrefixSampler | None = None
    chunk_size: int | None = None
    contrastive: bool = True
    causal_lm: bool = True
    with_items: bool = False
    with_image_keys: bool = False
    stored_images: StoredImages | None = None

    def __call__(self, examples: list[Example | Skipped | None]) -> dict[str, Any]:
        if isinstance(examples[0], Skipped):
            return {}
        last = examples[-1]
        batch = self._collate_good(examples)
        if isinstance(last, Example) and last.position is not None:
            info = get_worker_info()
            batch["position"] = json.dumps([0 if info is None else info.id, last.position])
        return batch

    def _collate_good(self, examples) -> dict[str, Any]:
        good = [example for example in examples if example is not None]
        try:
            if good:
                return self._collate(good)
        except RowError:
            if not self.skip_bad_rows:
                raise
            # Each row is tried once more, alone, however many of them are bad.
            good = [example for example in good if self._is_usable(example)]
            if good:
                return self._collate(good)
        logger.warning("None of the %d rows of a batch can be used.", len(examples))
        return idle_batch(self._collate([_BLANK]))

    def _is_usable(self, example: Example) -> bool:
        try:
            self._collate([example])
        except RowError as error:
            logger.warning("Skipped: %s", error)
            return False
        return True

    def _collate(self, examples: list[Example]) -> dict[str, Any]:
        with_slices = self.prefixes is not None and all(example.slices for example in examples)
        chunks: list[dict[str, Any]] = []
        contrasted = [self.contrastive and example.positive is not None for example in examples]
        position, learned = self.processor.embedding_position, self.causal_lm or with_slices
        anchors = [
            (example, sequence, flag, place == 0)
            for example, flag in zip(examples, contrasted, strict=True)
            for place, sequence in enumerate(example.anchor_sequences(position, learned, flag))
        ]
        owners, sequences, embedded, have_slices = map(list, zip(*anchors, strict=True))
        spans, slice_spans = self._process(chunks, owners, sequences, self.splitter if with_slices else None)
        batch: dict[str, Any] = {"rows": torch.tensor([example.row for example in examples])}
        # Prompted rows without a positive (only a long caption) have a target, but are not embedded.
        wanted = {"anchors": spans[torch.tensor(embedded)[spans[:, 0]]]}
        if slice_spans is not None and self.prefixes is not None:
            slice_spans = slice_spans[torch.tensor(have_slices)[slice_spans[:, 0]]]
            wanted["slices"], batch["structure"] = self.prefixes(examples, slice_spans)

        matched = [example for example, flag in zip(examples, contrasted, strict=True) if flag]
        batch["anchor_rows"] = torch.tensor([example.row for example in matched], dtype=torch.long)
        owners = matched + [example for example in matched for _ in example.negatives]
        candidates = [example.positive or [] for example in matched]
        candidates += [negative for example in matched for negative in example.negatives]
        spans, _ = self._process(chunks, owners, [InputSequence(each) for each in candidates], None)
        wanted["positives"], wanted["negatives"] = spans[: len(matched)], spans[len(matched) :]
        if self.with_items:
            batch |= _items(matched)
        batch |= self._keys(examples, contrasted, candidates)

        table = torch.cat(list(wanted.values()))[:, 1:]
        for number, chunk in enumerate(chunks):
            chunk["spans"] = table[table[:, 0] == number, 1:]
        places = torch.empty(len(table), dtype=torch.long)
        places[table[:, 0].argsort(stable=True)] = torch.arange(len(table))
        batch["places"] = dict(zip(wanted, places.split([len(part) for part in wanted.values()]), strict=True))
        return {"chunks": chunks, **batch}

    def _keys(self, examples, contrasted: list[bool], candidates: list[Messages]) -> dict[str, torch.Tensor]:
        """The content keys of the embedded anchors and of the candidates, and those of all images with captions."""
        anchor_keys, caption_keys = [], []
        for example, flag in zip(examples, contrasted, strict=True):
            captions = example.captions if self.contrastive else []
            key = content_key(example.anchor) if flag or captions else 0
            anchor_keys += [key] if flag else []
            caption_keys += [(key, content_key(caption)) for caption in captions]
        candidate_keys = [content_key(without_instruction(each)) for each in candidates]
        return {
            "anchor_keys": torch.tensor(anchor_keys, dtype=torch.long),
            "positive_keys": torch.tensor(candidate_keys[: len(anchor_keys)], dtype=torch.long),
            "negative_keys": torch.tensor(candidate_keys[len(anchor_keys) :], dtype=torch.long),
            "caption_keys": torch.tensor(caption_keys, dtype=torch.long).reshape(-1, 2),
        }

    def _process(self, chunks, owners, sequences: list[InputSequence], sentence_ends):
        """Appends the chunks of `sequences` to `chunks`. Returns the spans and, with `sentence_ends`, the slice spans
        (otherwise `None`), as tables of sequence, chunk, row, start and end, in the order of the sequences."""
        tables: dict[str, list[torch.Tensor]] = {"spans": [], "slice_spans": []}
        for part in self._parts(sequences):
            messages, targets, prompted, label_history = map(
                list, zip(*(sequences[place] for place in part), strict=True)
            )
            settings = {
                "prompted": prompted,
                "label_history": label_history,
                "max_length": self.max_length,
                "padding_side": "right",
                "sentence_ends": sentence_ends,
                "image_lengths": self.with_image_keys,
            }
            keys = []
            if self.with_image_keys:
                keys = [image_key(image) for each in messages for image in iter_image_parts(each)]
            try:
                inputs = None
                if self.stored_images is not None:
                    inputs = self.stored_images.process(keys, messages, targets, **settings)
                if inputs is None:
                    inputs = self.processor.process_sequences(messages, targets, **settings)
            except SequenceError as error:
                owner = owners[part[error.index]]
                raise RowError(owner.row, error.reason, owner.source) from error
            for name, table in tables.items():
                spans = inputs.pop(name, torch.empty(0, 3, dtype=torch.long))
                sequence = torch.tensor(part)[spans[:, 0]]
                table.append(torch.column_stack([sequence, torch.full_like(sequence, len(chunks)), spans]))
            if "labels" not in inputs or not self.causal_lm:
                inputs["labels"] = torch.full_like(inputs["input_ids"], -100)
            if self.with_image_keys:
                # Some families make fewer tokens of an image that has others beside it.
                inputs["image_keys"] = list(zip(keys, inputs.pop("image_lengths").tolist(), strict=True))
            chunks.append(dict(inputs))
        none = torch.empty(0, 5, dtype=torch.long)
        spans, slice_spans = [torch.cat([none, *table]) for table in tables.values()]
        in_order = spans[:, 0].argsort(stable=True), slice_spans[:, 0].argsort(stable=True)
        return spans[in_order[0]], None if sentence_ends is None else slice_spans[in_order[1]]

    def _parts(self, sequences: list[InputSequence]) -> list[list[int]]:
        """Returns the indices of the sequences of each chunk, sorted by length if there is a `chunk_size`."""
        places = list(range(len(sequences)))
        if self.chunk_size is None:
            return [places] if places else []
        lengths = [sequence_length(self.processor, each.messages, each.target) for each in sequences]
        places.sort(key=lambda place: -lengths[place])
        return [places[start : start + self.chunk_size] for start in range(0, len(places), self.chunk_size)]


def _items(examples: list[Example]) -> dict[str, torch.Tensor]:
    pairs = [[(item.key, item.content) for item in items_of(example)] for example in examples]
    table = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2, 2)
    return {"anchor_items": table[:, 0], "positive_items": table[:, 1]}


def collator_for_objective(
    collator: Any, args: UniGDTrainingArguments, context_length: int | None = None
) -> UniGDDataCollator:
    """
    Returns a copy of the collator with the fields that the arguments determine.

    Args:
        collator: The collator.
        args: The training arguments.
        context_length: Maximum number of tokens that the model takes. It is the limit where `max_length` sets none.

    Raises:
        TypeError: the collator is not a [`UniGDDataCollator`].
        ValueError: `max_length` or `skip_bad_rows` is set in `args`, and the collator has another value, or
            `max_length` is more than the model takes.
    """
    if not isinstance(collator, UniGDDataCollator):
        raise TypeError(
            f"`data_collator` must be a UniGDDataCollator, got {type(collator).__name__}, because a batch consists of "
            "chunks, spans and keys. Subclass UniGDDataCollator, or override `UniGDTrainer.get_data_collator`."
        )
    for name in ("max_length", "skip_bad_rows"):
        if getattr(args, name) not in (None, False, getattr(collator, name)):
            raise ValueError(
                f"`{name}` is {getattr(args, name)!r} in `args` and {getattr(collator, name)!r} in `data_collator`. "
                "Give both the same value."
            )
    collator = copy.copy(collator)
    if collator.max_length is None:
        collator.max_length = context_length
    elif context_length is not None and collator.max_length > context_length:
        raise ValueError(
            f"`max_length={collator.max_length}` is more than the {context_length} tokens of the model's context."
        )
    collator.splitter = args.splitter if args.alignment_weight else None
    keep_all = args.alignment_similarity == "kernel"
    collator.prefixes = PrefixSampler(args.alignment_positions, args.seed, keep_all=keep_all)
    collator.chunk_size = args.gradient_cache_chunk_size
    collator.contrastive, collator.causal_lm = bool(args.contrastive_weight), bool(args.causal_lm_weight)
    collator.with_image_keys = args.vision_cache is not None
    return collator
