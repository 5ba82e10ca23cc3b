"""The text of tokens that come one by one."""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class StreamedText:
    """
    Decodes tokens as they come, without special tokens, up to the first of some texts to stop at, which is left out.

    Args:
        tokenizer: Decodes the tokens. Nobody may change it meanwhile.
        stops: The texts to stop at.

    Attributes:
        has_stopped: Whether one of `stops` has come.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stops = stops
        self._stream = DecodeStream([], skip_special_tokens=True)
        self._tokens: list[int] = []
        self._text = ""
        self._given = 0  # characters
        self.has_stopped = False

    def add(self, token: int) -> str:
        """The text that has become certain with one more token: not the start of a character or of a stop."""
        self._tokens.append(token)
        self._text += self._stream.step(self._tokenizer, token) or ""
        return self._give(self._certain())

    def end(self) -> str:
        """The rest of the text, once there are no more tokens."""
        if not self.has_stopped:
            whole = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
            if whole.startswith(self._text):  # with what is left of a character
                self._text = whole
        return self._give(len(self._text))

    def _certain(self) -> int:
        """How many characters are certain. Cuts the text at the first stop."""
        found = [place for stop in self._stops if (place := self._text.find(stop, self._given)) >= 0]
        if found:
            self._text, self.has_stopped = self._text[: min(found)], True
            return len(self._text)
        begun = (size for stop in self._stops for size in range(1, len(stop)) if self._text.endswith(stop[:size]))
        return len(self._text) - max(begun, default=0)

    def _give(self, end: int) -> str:
        given, self._given = self._text[self._given : end], max(self._given, end)
        return given
