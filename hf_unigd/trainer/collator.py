"""Batches of examples: anchors with their captions, then the sequences that they are contrasted with."""

import logging
from dataclasses import dataclass
from typing import Any

import torch

from ..data import Example, RowError
from ..data.example import content_key
from ..data.slices import SentenceSplitter
from ..modeling import SequenceError, UniGDProcessor
from .prefixes import PrefixSampler


logger = logging.getLogger(__name__)


@dataclass
class UniGDDataCollator:
    """
    Collates examples for [`UniGDTrainer`].

    Returns a dict of
        anchors: model inputs of all anchors, with `spans` of those that are embedded and `labels` of those with a
            target;
        candidates: model inputs of the positives, in the order of the embedded anchors, then of the negatives; absent
            where no example has a positive;
        anchor_keys `(n,)`, candidate_keys `(n + m,)`: content keys for masking duplicates;
        structure: inputs of [`StructureLoss`], where examples have slices; the spans that it embeds follow the others
            in the anchors' `spans`;
        rows `(batch_size,)`: indices in the dataset, for messages.

    Args:
        processor: Turns sequences into model inputs.
        max_length: Longest row in tokens; a longer one is a bad row.
        skip_bad_rows: Leave bad rows out, counted in the log, instead of raising. None stands for one that was found
            bad before.
        splitter: Cuts the texts of examples with slices.
        prefixes: Chooses where the structure loss looks in them.

    Raises:
        RowError: a row cannot be processed and `skip_bad_rows` is off.
        ValueError: every row of the batch is bad.
    """

    processor: UniGDProcessor
    max_length: int | None = None
    skip_bad_rows: bool = False
    splitter: SentenceSplitter | None = None
    prefixes: PrefixSampler | None = None

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
        has_slices = all(example.slices for example in examples)
        matched = [(example, example.positive) for example in examples if example.positive is not None]
        prompted = [example.prompted for example in examples]
        anchors = self._process(
            examples,
            [example.anchor for example in examples],
            targets=[example.target for example in examples],
            prompted=prompted,
            sentence_ends=self.splitter if has_slices else None,
        )
        slice_spans = anchors.pop("slice_spans", None)
        # Prompted rows without a positive (a long caption alone) are continued, not embedded.
        embedded = torch.tensor([example.positive is not None for example in examples])
        anchors["spans"] = anchors["spans"][embedded[anchors["spans"][:, 0]]]
        batch: dict[str, Any] = {"rows": torch.tensor([example.row for example in examples])}
        if slice_spans is not None and self.prefixes is not None:
            chosen, batch["structure"] = self.prefixes(examples, slice_spans)
            anchors["spans"] = torch.cat([anchors["spans"], chosen])
        batch["anchors"] = dict(anchors)
        if matched:
            pairs = matched + [(example, negative) for example, _ in matched for negative in example.negatives]
            owners, sequences = zip(*pairs, strict=True)
            batch["candidates"] = dict(self._process(owners, list(sequences)))
            batch["anchor_keys"] = torch.tensor([content_key(example.anchor) for example, _ in matched])
            batch["candidate_keys"] = torch.tensor([content_key(sequence) for sequence in sequences])
        return batch

    def _process(self, owners, sequences, **kwargs):
        try:
            return self.processor.process_sequences(
                sequences, max_length=self.max_length, padding_side="right", **kwargs
            )
        except SequenceError as error:
            raise RowError(owners[error.index].row, error.reason) from error
