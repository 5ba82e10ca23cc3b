"""The check that a row can be processed, without processing its images."""

import hashlib
import json
from dataclasses import dataclass

from ..modeling import SequenceError, UniGDProcessor
from .example import Example, InputSequence, RowError


@dataclass
class ExampleCheck:
    """
    Refuses an example that the collator would refuse: one that is too long, that the chat template does not render, or
    that has an image which the backbone's processor does not take.

    Args:
        processor: The processor.
        max_length: Maximum number of tokens of a sequence with its target.
        causal_lm: Whether targets are processed.
        contrastive: Whether positives and negatives are processed.
    """

    processor: UniGDProcessor
    max_length: int | None = None
    causal_lm: bool = True
    contrastive: bool = True

    @property
    def settings(self) -> str:
        """Identifies the check: all that its answers depend on."""
        processor, digest = self.processor, hashlib.sha256()
        parts = (
            processor.tokenizer.backend_tokenizer.to_str(),
            processor.image_processor.to_json_string(),
            json.dumps([processor.to_dict(), processor.chat_template], sort_keys=True),
        )
        for part in (*parts, str((self.max_length, self.causal_lm, self.contrastive))):
            digest.update(part.encode())
        return digest.hexdigest()

    def __call__(self, example: Example) -> None:
        """
        Raises:
            RowError: the example cannot be processed.
        """
        contrasted = self.contrastive and example.positive is not None
        sequences = example.anchor_sequences(self.processor.embedding_position, self.causal_lm, contrasted)
        if contrasted:
            sequences += [InputSequence(each) for each in (example.positive or [], *example.negatives)]
        for each in sequences:
            try:
                self.processor.check_sequence(
                    each.messages,
                    each.target,
                    prompted=each.prompted,
                    label_history=each.label_history,
                    max_length=self.max_length,
                )
            except SequenceError as error:
                raise RowError(example.row, error.reason, example.source) from error
