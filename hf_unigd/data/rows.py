"""Recognises the format of a row by its columns and turns the row into an [`Example`]."""

import logging
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any

from ..modeling.images_unigd import MAX_PIXELS
from ..modeling.instructions_unigd import with_instruction
from .chats import as_list, from_llava, only_answer, read_chat, read_chats
from .example import Example, Messages, RowError, iter_parts
from .formats import CAPTION_ID, IMAGE_ID, format_of, holds_many, is_negative
from .images import open_image
from .published import from_mmc4, from_mmeb
from .slices import SentenceSplitter, slices_of


logger = logging.getLogger(__name__)


@dataclass
class RowParser:
    """Turns rows into examples. The format of a row is recognised by those of its columns that are not None.

    Attributes:
        count_tokens: Returns the length of a text in tokens.
        short_caption_max_tokens: A `caption` with fewer tokens than this is a contrastive positive; any other is a
            next-token target (VladVA: 30).
        long_caption_max_tokens: Maximum length of a caption in tokens (VladVA: 500).
        match_every_caption: Whether a `caption` that is long enough for a target is a match too, as in evaluation.
        trust_caption_columns: Whether a `short_caption` or `long_caption` is one whatever its length. If not, it is
            left out if it is not of the length of one.
        image_folder: Folder that image paths start from and must not leave.
        max_image_pixels: The largest width times height of an image. It is checked before an image is decoded.
        splitter: Splits texts into sentences. If given, examples get `slices`, and a chat needs neither an answer nor
            a match.
        requires_match: Whether a row needs something to learn from: a match, a caption, or an answer.
        mask_history: Whether only the last answer of a chat is learned, and not those before it.
        interleaved_captions: Whether an image and its `caption` are one sequence, to which there is no answer, as
            Sugar takes COYO.
        find_reserved: Returns the reserved token that a text holds, or None
            ([`~hf_unigd.UniGDProcessor.find_reserved`]). If given, a row with such a text is refused.
        instruction: The instruction of anchors that are embedded, in rows without an `instruction` of their own.
        document_instruction: The instruction of positives and negatives, in rows without a `document_instruction`.
        seed: Seed of the choice among several captions.
        source: Name of the dataset in errors, if it is one of several.
        read_image: Reads an image, as [`~hf_unigd.data.images.open_image`] does. What it returns takes the image's
            place: [`~hf_unigd.data.images.blank_image`] reads the header alone, and
            [`~hf_unigd.data.images.encoded_image`] keeps the bytes of the file.
        left_out: Number of captions that were left out, in rows of which another caption is used.
    """

    count_tokens: Callable[[str], int]
    short_caption_max_tokens: int = 30
    long_caption_max_tokens: int = 500
    match_every_caption: bool = False
    trust_caption_columns: bool = False
    image_folder: str | Path | None = None
    max_image_pixels: int = MAX_PIXELS
    splitter: SentenceSplitter | None = None
    requires_match: bool = True
    mask_history: bool = False
    interleaved_captions: bool = False
    find_reserved: Callable[[str], str | None] | None = None
    instruction: str | None = None
    document_instruction: str | None = None
    seed: int = 0
    source: str | None = None
    read_image: Callable[[Any, str | Path | None, int], Any] = open_image
    left_out: int = field(default=0, init=False)

    def __call__(self, row: Mapping[str, Any], index: int, epoch: int | None = 0) -> Example:
        """
        Args:
            row: Values by column name.
            index: Index of the row in the dataset.
            epoch: Current pass over the data, for what is drawn in each epoch. None takes the longest of several
                captions, to check them all at once.

        Raises:
            RowError: the row has no usable columns, or one of them is empty, corrupt, too long or inconsistent.
        """
        if not isinstance(row, Mapping):
            raise self._error(index, f"is a {type(row).__name__}, and a row is a dict of its columns.")
        example = self._parse(row, index, epoch)
        example.epoch, example.source = epoch or 0, self.source
        self._check_texts(example)
        if self.splitter is not None:
            try:
                example.slices = slices_of(example.anchor, example.target, self.splitter)
            except ValueError as error:
                raise self._error(index, f"{error}.") from error
        return example

    def _error(self, index: int, reason: str) -> RowError:
        return RowError(index, reason, self.source)

    def _check_texts(self, example: Example) -> None:
        """Raises if a tokenizer would read a part of a text as an image, the end of a sequence, or a soft prompt."""
        sequences = [example.anchor, example.positive or [], *example.negatives]
        texts = [part["text"] for sequence in sequences for _, part in iter_parts(sequence) if "text" in part]
        for text in [*texts, example.target or ""]:
            self._check_text(text, example.row)

    def _check_text(self, text: str, index: int) -> None:
        reserved = None if self.find_reserved is None else self.find_reserved(text)
        if reserved is not None:
            raise self._error(
                index,
                f"has the reserved token {reserved!r} in the text {_shortened(text, reserved)!r}, which the model "
                "would not read as text. Remove it from the row.",
            )

    def _parse(self, row: Mapping[str, Any], index: int, epoch: int | None) -> Example:
        row = {name: value for name, value in row.items() if value is not None}
        try:
            row_format = format_of(row, self.requires_match)
            example = self._parsers[row_format.name](row_format.under_own_names(row), index, epoch)
            self._instruct(example, row)
            return example
        except ValueError as error:
            raise self._error(index, f"{str(error).removesuffix('.')}.") from error

    def _instruct(self, example: Example, row: Mapping[str, Any]) -> None:
        """Puts the instructions of the row, or those of the parser, before what is embedded."""
        is_embedded = example.prompted or not self.requires_match
        instruction = _instruction(row, "instruction", self.instruction)
        if is_embedded:
            example.anchor = with_instruction(example.anchor, instruction)
        elif row.get("instruction"):
            raise ValueError(
                "has an `instruction`, but only what is embedded has one, and nothing in this chat is; write it into "
                "a turn, or remove it"
            )
        document_instruction = _instruction(row, "document_instruction", self.document_instruction)
        if example.positive is not None:
            example.positive = with_instruction(example.positive, document_instruction)
            example.negatives = [with_instruction(each, document_instruction) for each in example.negatives]
        elif row.get("document_instruction") and self.requires_match:
            raise ValueError("has a `document_instruction`, but no match that it belongs to; remove it")

    @property
    def _parsers(self) -> dict[str, Callable[[Mapping[str, Any], int, int | None], Example]]:
        """By the names of the formats."""
        return {
            "chat": self._from_messages,
            "llava": self._from_conversations,
            "mmc4": self._from_mmc4,
            "mmeb": self._from_mmeb,
            "pair": self._from_pair,
            "captions": self._from_captions,
        }

    def _from_pair(self, row, index, epoch) -> Example:
        return Example(
            row=index,
            anchor=self._user_turn(row["anchor"], "anchor"),
            positive=self._match(row["positive"], "positive") if "positive" in row else None,
            negatives=self._negatives(row),
        )

    def _from_mmeb(self, row, index, epoch) -> Example:
        return self._from_pair(from_mmeb(row), index, epoch)

    def _from_captions(self, row, index, epoch) -> Example:
        names = ("short_caption", "long_caption", "caption")
        conversations = {name: row[name] for name in names if _is_conversation(row.get(name))}
        row = {**row, **{name: only_answer(turns, name) for name, turns in conversations.items()}}
        captions = [_caption(text, name) for name in names for text in as_list(row.get(name))]
        texts = {name: self._draw(row, name, index, epoch) for name in names}
        short, long, caption = texts.values()
        if row.get("caption_weights") and not any(isinstance(row.get(name), (list, tuple)) for name in texts):
            raise ValueError("has `caption_weights`, but no list of captions; remove one of them")
        if caption is not None:
            if short is not None or long is not None:
                raise ValueError(
                    "has a `caption` beside a `short_caption` or `long_caption`; a `caption` becomes one of them by "
                    "its length, so remove one"
                )
            if self.interleaved_captions:
                parts = [{"type": "image", "image": row["image"]}, {"type": "text", "text": caption}]
                return self._from_messages({"messages": [{"role": "user", "content": parts}]}, index, epoch)
            if self.count_tokens(caption) < self.short_caption_max_tokens:
                short = caption
            else:
                long = caption
        short, long = self._within_limits(index, short_caption=short, long_caption=long)
        if self.match_every_caption and short is None:
            short = caption
        negatives = self._negatives(row)
        # With a limit of 0, no caption is contrasted, and negatives are not wanted either.
        if negatives and short is None and self.requires_match and self.short_caption_max_tokens:
            raise ValueError("has negatives, but no short caption, so there is nothing that they are contrasted with")
        return Example(
            row=index,
            anchor=_turn([{"type": "image", "image": self._open_image(row["image"])}]),
            positive=None if short is None else _text_turn(short),
            negatives=negatives,
            captions=[_text_turn(text) for text in captions],
            image_id=row.get(IMAGE_ID),
            caption_id=_caption_id(row, "short_caption" if caption is None else "caption", short),
            target=long,
        )

    def _draw(self, row, name, index, epoch) -> str | None:
        """The caption of a column. Which one of a list it is depends on the seed, the row and the epoch."""
        value, weights = row.get(name), row.get("caption_weights")
        if value is None:
            return None
        if not isinstance(value, (list, tuple)):
            return _caption(value, name)
        captions = [_caption(text, name) for text in value]
        if not captions:
            raise ValueError(f"has an empty `{name}`")
        for text in captions:
            self._check_text(text, index)
        if weights is not None and not _are_weights(weights, len(captions)):
            raise ValueError(
                f"has `caption_weights` that are not {len(captions)} numbers, one for each caption in `{name}`, of "
                "which some are positive and none is negative"
            )
        limits = self._limits[name]
        usable = [limits.reason(self.count_tokens(text)) is None for text in captions]
        if any(usable):  # otherwise the row is refused, or another column of it used
            captions = list(compress(captions, usable))
            weights = weights and list(compress(weights, usable))
        if epoch is None or not any(weights or [1]):
            return max(captions, key=self.count_tokens)
        return random.Random(f"{self.seed}-{epoch}-{index}-{name}").choices(captions, weights)[0]

    @property
    def _limits(self) -> dict[str, "_Limits"]:
        """What each caption column may hold. If nothing is contrasted, any length is learned."""
        least, most = self.short_caption_max_tokens, self.long_caption_max_tokens
        too_long = f"more than `long_caption_max_tokens={most}`"
        limits = dict.fromkeys(("short_caption", "long_caption", "caption"), _Limits(0, most, "", too_long))
        if least and not self.trust_caption_columns:
            short, long = (f"{relation} `short_caption_max_tokens={least}`" for relation in ("not below", "below"))
            limits["short_caption"] = _Limits(0, least - 1, "", short)
            limits["long_caption"] = _Limits(least, most, long, too_long)
        return limits

    def _within_limits(self, index: int, **captions: str | None) -> tuple[str | None, ...]:
        """The captions, without one that is too short or too long for its column if the row has another one.

        Raises:
            ValueError: no caption is left.
        """
        given = {name: text for name, text in captions.items() if text is not None}
        reasons = {name: self._limits[name].reason(self.count_tokens(text)) for name, text in given.items()}
        wrong = {name: reason for name, reason in reasons.items() if reason is not None}
        for name, reason in wrong.items():
            if len(wrong) == len(given):
                trust = "" if self.trust_caption_columns else ", or set `trust_caption_columns`"
                raise ValueError(f"has a `{name}` of {reason}; change it or the limit{trust}")
            self._leave_out(index, name, reason)
        return tuple(None if name in wrong else text for name, text in captions.items())

    def _leave_out(self, index: int, name: str, reason: str) -> None:
        """Counts a caption of a row of which another one is used. The log has the counts 1, 2, 4, 8, ..."""
        self.left_out += 1
        if self.left_out & (self.left_out - 1) == 0:
            logger.warning(
                "Left out %d captions so far, the last one the `%s` of row %d, of %s.",
                self.left_out,
                name,
                index,
                reason,
            )

    def _from_conversations(self, row, index, epoch) -> Example:
        return self._from_messages({**row, "messages": from_llava(row["conversations"])}, index, epoch)

    def _from_mmc4(self, row, index, epoch) -> Example:
        return self._from_messages({"messages": from_mmc4(row)}, index, epoch)

    def _from_messages(self, row, index, epoch) -> Example:
        if "image" in row and row.get("images"):
            raise ValueError("has both `image` and `images`; remove one")
        images = row.get("images") or row.get("image")
        messages = read_chat(row["messages"], images, "messages", self._open_image)
        target = None
        if messages[-1]["role"] == "assistant":
            answer = messages.pop()["content"]
            if any(part["type"] == "image" for part in answer):
                raise ValueError(
                    "has images in the last answer, but the model generates only text; move them into an earlier "
                    "user's turn"
                )
            target = " ".join(part["text"] for part in answer)
        if not messages or messages[-1]["role"] != "user":
            raise ValueError("has `messages` without a user's turn before the answer")
        positives, negatives = self._matches(row, "positive"), self._matches(row, "negative")
        if len(positives) > 1:
            raise ValueError(f"has {len(positives)} conversations in `positive_messages`; give one per row")
        if negatives and not positives:
            raise ValueError("has `negative_messages`, but no `positive_messages` that they are contrasted with")
        # A chat that ends with a question and has a match is only embedded.
        label_history = (
            not self.mask_history
            and (target is not None or not positives)
            and any(turn["role"] == "assistant" for turn in messages)
        )
        is_learned = positives or target is not None or label_history
        if not is_learned and self.requires_match and self.splitter is None:
            reason = "has neither an assistant's answer that is learned nor `positive_messages`"
            raise ValueError(f"{reason}, so there is nothing to learn")
        return Example(
            row=index,
            anchor=messages,
            positive=positives[0] if positives else None,
            negatives=negatives,
            target=target,
            prompted=bool(positives),
            is_chat=True,
            label_history=label_history,
        )

    def _matches(self, row, kind) -> list[Messages]:
        """The chats of `positive_messages` or `negative_messages`, which are embedded."""
        name = f"{kind}_messages"
        chats = read_chats(row.get(name), row.get(f"{kind}_images"), name, self._open_image)
        if any(chat[-1]["role"] != "user" for chat in chats):
            raise ValueError(f"has a chat in `{name}` that does not end with the user's turn")
        return chats

    def _open_image(self, value):
        return self.read_image(value, self.image_folder, self.max_image_pixels)

    def _negatives(self, row) -> list[Messages]:
        negatives = []
        for name, value in row.items():
            if is_negative(name) and holds_many(name):
                negatives += [self._user_turn(each, name) for each in as_list(value)]
            elif is_negative(name):
                negatives.append(self._match(value, name))
        return negatives

    def _match(self, value, name) -> Messages:
        """One match or negative. A list of texts alone, or of images alone, may mean several of them."""
        parts = as_list(value)
        if len(parts) > 1 and len({isinstance(part, str) for part in parts}) == 1:
            kind = "texts" if isinstance(parts[0], str) else "images"
            remedy = "give one per row" if name == "positive" else "name the column `negatives`"
            raise ValueError(
                f"has a list of {len(parts)} {kind} in `{name}`: if each of them is one, {remedy}; if they are one "
                "sequence, give a chat (`messages`, `positive_messages`, `negative_messages`)"
            )
        return self._user_turn(value, name)

    def _user_turn(self, value, name) -> Messages:
        """A user's turn that holds one text, one image, or a list of both."""
        parts = as_list(value)
        if not parts:
            raise ValueError(f"has an empty `{name}`")
        return _turn(
            [
                {"type": "text", "text": _caption(part, name)}
                if isinstance(part, str)
                else {"type": "image", "image": self._open_image(part)}
                for part in parts
            ]
        )


@dataclass(frozen=True)
class _Limits:
    """The least and the greatest number of tokens of a caption, and what is said of one with fewer or more."""

    least: int
    most: int
    below: str
    above: str

    def reason(self, length: int) -> str | None:
        """Why a caption of this length is not used, or None."""
        if self.least <= length <= self.most:
            return None
        return f"{length} tokens, {self.below if length < self.least else self.above}"


def _instruction(row, name, default) -> str | None:
    """The instruction of a row, which is none if it is an empty text, or the default where the row has none."""
    if name not in row:
        return default
    if not isinstance(row[name], str):
        raise ValueError(f"has an `{name}` of type {type(row[name]).__name__}, but a text is needed")
    return row[name].strip() or None


def _turn(content) -> Messages:
    return [{"role": "user", "content": content}]


def _text_turn(text: str) -> Messages:
    return _turn([{"type": "text", "text": text}])


def _is_conversation(value) -> bool:
    return isinstance(value, (list, tuple)) and any(isinstance(turn, dict) for turn in value)


def _shortened(text: str, part: str) -> str:
    """The text around `part`."""
    start = text.index(part)
    return text[max(0, start - 20) : start + len(part) + 20]


def _are_weights(values, count: int) -> bool:
    is_list = isinstance(values, (list, tuple)) and len(values) == count
    return (
        is_list
        and all(isinstance(value, (int, float)) and 0 <= value < math.inf for value in values)
        and any(value > 0 for value in values)
    )


def _caption_id(row, name, caption) -> Any:
    """The id of a caption of a column: of a list beside a list of captions, that of its place."""
    ids, captions = row.get(CAPTION_ID), as_list(row.get(name))
    if caption is not None and isinstance(ids, (list, tuple)) and len(ids) == len(captions):
        return ids[[text.strip() for text in captions].index(caption)]
    return ids


def _caption(value, name) -> str:
    if not isinstance(value, str):
        raise ValueError(f"has a `{name}` of type {type(value).__name__}, but a text is needed")
    if not value.strip():
        raise ValueError(f"has an empty `{name}`")
    return value.strip()
