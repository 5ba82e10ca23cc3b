"""The check that a row can be processed, without processing its images."""

import hashlib
import json
from dataclasses import dataclass

from ..modeling import SequenceError, UniGDProcessor
from .example import Example, Messages, RowError


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
        self._check(example, example.anchor, example.target if self.causal_lm else None, example.prompted)
        if self.contrastive and example.positive is not None:
            for sequence in (example.positive, *example.negatives):
                self._check(example, sequence, None, True)

    def _check(self, example: Example, sequence: Messages, target: str | None, prompted: bool) -> None:
        try:
            self.processor.check_sequence(sequence, target, prompted=prompted, max_length=self.max_length)
        except SequenceError as error:
            raise RowError(example.row, error.reason, example.source) from error
