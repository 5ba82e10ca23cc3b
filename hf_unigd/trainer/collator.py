"""Batches of examples, in chunks that go through the model one after the other."""

import copy
import logging
from dataclasses import dataclass
from typing import Any

import torch

from ..data import Example, RowError
from ..data.example import content_key, iter_images
from ..data.lengths import sequence_length
from ..data.slices import SentenceSplitter
from ..modeling import SequenceError, UniGDProcessor
from .arguments import UniGDTrainingArguments
from .prefixes import PrefixSampler
from .vision import image_key


logger = logging.getLogger(__name__)


@dataclass
class UniGDDataCollator:
    """
    Collates examples for [`UniGDTrainer`].

    Returns a dict of
        chunks: a list of model inputs, each padded for itself, with the `spans` to embed and `labels`: anchors with
            their targets, then candidates (the positives of the embedded anchors, and negatives);
        places: by name, where in the embeddings of all chunks, one below the other, are those of the `anchors` `(n,)`,
            their `positives` `(n,)`, the `negatives` `(m,)`, and the `slices` that the structure loss looks at;
        anchor_rows `(n,)`: rows of the embedded anchors in the dataset;
        anchor_keys, positive_keys `(n,)`, negative_keys `(m,)`: content keys for masking duplicates;
        structure: inputs of [`StructureLoss`] but for its embeddings, where examples have slices;
        rows `(batch_size,)`: indices in the dataset, for messages.

    Args:
        processor: Turns sequences into model inputs.
        max_length: Longest row in tokens; a longer one is a bad row.
        skip_bad_rows: Leave bad rows out, counted in the log, instead of raising. None stands for one that was found
            bad before.
        splitter: Cuts the texts of examples with slices.
        prefixes: Chooses where the structure loss looks in them.
        chunk_size: Rows a chunk, of about the same length; all anchors and all candidates by default.
        contrastive: Whether anchors are embedded and contrasted.
        causal_lm: Whether targets are learned. Where not, they are read only if slices lie in them.
        with_image_keys: Adds to chunks with pictures their [`~hf_unigd.trainer.vision.image_key`]s.

    Raises:
        RowError: a row cannot be processed and `skip_bad_rows` is off.
        ValueError: every row of the batch is bad.
    """

    processor: UniGDProcessor
    max_length: int | None = None
    skip_bad_rows: bool = False
    splitter: SentenceSplitter | None = None
    prefixes: PrefixSampler | None = None
    chunk_size: int | None = None
    contrastive: bool = True
    causal_lm: bool = True
    with_image_keys: bool = False

    def __call__(self, examples: list[Example | None]) -> dict[str, Any]:
        good = [example for example in examples if example is not None]
        while good:
            try:
                return self._collate(good)
            except RowError as error:
                if not self.skip_bad_rows:
                    raise
                logger.warning("Skipped: %s", error)
                good = [example for example in good if example.row != error.row]
        raise ValueError(f"None of the {len(examples)} rows of a batch can be used; the log has each one's reason.")

    def _collate(self, examples: list[Example]) -> dict[str, Any]:
        with_slices = self.prefixes is not None and all(example.slices for example in examples)
        chunks: list[dict[str, Any]] = []
        spans, slice_spans = self._process(
            chunks,
            examples,
            [example.anchor for example in examples],
            [example.target if self.causal_lm or with_slices else None for example in examples],
            [example.prompted for example in examples],
            self.splitter if with_slices else None,
        )
        batch: dict[str, Any] = {"rows": torch.tensor([example.row for example in examples])}
        # Prompted rows without a positive (a long caption alone) are continued, not embedded.
        embedded = torch.tensor([self.contrastive and example.positive is not None for example in examples])
        wanted = {"anchors": spans[embedded[spans[:, 0]]]}
        if slice_spans is not None and self.prefixes is not None:
            wanted["slices"], batch["structure"] = self.prefixes(examples, slice_spans)

        matched = [example for example, flag in zip(examples, embedded.tolist(), strict=True) if flag]
        batch["anchor_rows"] = torch.tensor([example.row for example in matched], dtype=torch.long)
        owners = matched + [example for example in matched for _ in example.negatives]
        sequences = [example.positive or [] for example in matched]
        sequences += [negative for example in matched for negative in example.negatives]
        spans, _ = self._process(chunks, owners, sequences, [None] * len(sequences), [True] * len(sequences), None)
        wanted["positives"], wanted["negatives"] = spans[: len(matched)], spans[len(matched) :]
        for name, keyed in (
            ("anchor_keys", [example.anchor for example in matched]),
            ("positive_keys", sequences[: len(matched)]),
            ("negative_keys", sequences[len(matched) :]),
        ):
            batch[name] = torch.tensor([content_key(sequence) for sequence in keyed], dtype=torch.long)

        table = torch.cat(list(wanted.values()))[:, 1:]
        for number, chunk in enumerate(chunks):
            chunk["spans"] = table[table[:, 0] == number, 1:]
        places = torch.empty(len(table), dtype=torch.long)
        places[table[:, 0].argsort(stable=True)] = torch.arange(len(table))
        batch["places"] = dict(zip(wanted, places.split([len(part) for part in wanted.values()]), strict=True))
        return {"chunks": chunks, **batch}

    def _process(self, chunks, owners, sequences, targets, prompted, sentence_ends):
        """Adds the chunks of these sequences; returns their spans, and those of their slices where they are cut:
        tables of sequence, chunk, row, start, end, in the order of the sequences."""
        tables: dict[str, list[torch.Tensor]] = {"spans": [], "slice_spans": []}
        for part in self._parts(sequences, targets):
            try:
                inputs = self.processor.process_sequences(
                    [sequences[place] for place in part],
                    [targets[place] for place in part],
                    prompted=[prompted[place] for place in part],
                    max_length=self.max_length,
                    padding_side="right",
                    sentence_ends=sentence_ends,
                )
            except SequenceError as error:
                raise RowError(owners[part[error.index]].row, error.reason) from error
            for name, table in tables.items():
                spans = inputs.pop(name, torch.empty(0, 3, dtype=torch.long))
                sequence = torch.tensor(part)[spans[:, 0]]
                table.append(torch.column_stack([sequence, torch.full_like(sequence, len(chunks)), spans]))
            if "labels" not in inputs or not self.causal_lm:
                inputs["labels"] = torch.full_like(inputs["input_ids"], -100)
            if self.with_image_keys and "pixel_values" in inputs:
                inputs["image_keys"] = [image_key(image) for place in part for image in iter_images(sequences[place])]
            chunks.append(dict(inputs))
        none = torch.empty(0, 5, dtype=torch.long)
        spans, slice_spans = [torch.cat([none, *table]) for table in tables.values()]
        in_order = spans[:, 0].argsort(stable=True), slice_spans[:, 0].argsort(stable=True)
        return spans[in_order[0]], None if sentence_ends is None else slice_spans[in_order[1]]

    def _parts(self, sequences, targets) -> list[list[int]]:
        """Which sequences share a chunk: those of about the same length, the longest first."""
        places = list(range(len(sequences)))
        if self.chunk_size is None:
            return [places] if places else []
        lengths = [sequence_length(self.processor, *pair) for pair in zip(sequences, targets, strict=True)]
        places.sort(key=lambda place: -lengths[place])
        return [places[start : start + self.chunk_size] for start in range(0, len(places), self.chunk_size)]


def collator_for_objective(collator: Any, args: UniGDTrainingArguments) -> UniGDDataCollator:
    """The collator with those fields set that the arguments decide."""
    if not isinstance(collator, UniGDDataCollator):
        raise TypeError(
            f"`data_collator` must be a UniGDDataCollator, got {type(collator).__name__}: a batch holds chunks of "
            "model inputs, spans and keys. Subclass UniGDDataCollator, or override `UniGDTrainer.get_data_collator`."
        )
    for name in ("max_length", "skip_bad_rows"):
        if getattr(args, name) not in (None, False, getattr(collator, name)):
            raise ValueError(
                f"`{name}` is {getattr(args, name)!r} in `args` and {getattr(collator, name)!r} in `data_collator`. "
                "Give both the same value."
            )
    collator = copy.copy(collator)
    collator.splitter = args.splitter if args.alignment_weight else None
    keeps_all = args.alignment_similarity == "kernel"
    collator.prefixes = PrefixSampler(args.alignment_positions, args.seed, keep_all=keeps_all)
    collator.chunk_size = args.gradient_cache_chunk_size
    collator.contrastive, collator.causal_lm = bool(args.contrastive_weight), bool(args.causal_lm_weight)
    collator.with_image_keys = args.vision_cache is not None
    return collator
