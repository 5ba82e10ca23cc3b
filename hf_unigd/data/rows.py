"""Recognises the format of a row by its columns and turns the row into an [`Example`]."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..modeling.images_unigd import MAX_PIXELS
from .example import Example, Messages, RowError, iter_parts
from .images import open_image
from .slices import SentenceSplitter, slices_of


ACCEPTED = """\
  messages [+ images] [+ positive_messages] [+ negative_messages]   chat, ms-swift's and TRL's columns
  conversations [+ image]                                           LLaVA's columns
  anchor, positive [, negative, negative_1, ...]                    sentence-transformers' columns
  image, short_caption and/or long_caption                          contrastive and next-token captions
  image, caption                                                    a short or long caption, by its length"""

_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
# TRL's and LLaVA's data mark an image inside a text with this tag, whatever the image token of the model is.
_IMAGE_TAG = "<image>"


def check_columns(columns: list[str], requires_match: bool = True) -> None:
    """Checks that a dataset has the columns of an accepted row format.

    Args:
        columns: Column names of the dataset.
        requires_match: Whether rows need a match, a caption or an answer; if not, `anchor` or `image` alone is enough.

    Raises:
        ValueError: the columns fit no accepted format. The message names them.
    """
    have = set(columns)
    if not requires_match and have & {"anchor", "image"}:
        return
    if "messages" in have or "conversations" in have or {"anchor", "positive"} <= have:
        return
    if "image" in have and have & {"short_caption", "long_caption", "caption"}:
        return
    raise ValueError(
        f"No accepted row format has the columns {sorted(columns)}. Rename them (`--rename_columns`) to one of:\n"
        + ACCEPTED
    )


@dataclass
class RowParser:
    """Turns rows into examples. The format of a row is recognised by those of its columns that are not None.

    Attributes:
        count_tokens: Returns the length of a text in tokens.
        short_caption_max_tokens: A `caption` with fewer tokens than this is a contrastive positive; any other is a
            next-token target (VladVA: 30).
        long_caption_max_tokens: Maximum length of a caption in tokens (VladVA: 500).
        image_folder: Folder that image paths start from and must not leave.
        max_image_pixels: The largest width times height of an image. It is checked before an image is decoded.
        splitter: Splits texts into sentences. If given, examples get `slices`, and a chat needs neither an answer nor
            a match.
        requires_match: Whether a row needs something to learn from: a match, a caption, or an answer.
        find_reserved: Returns the reserved token that a text holds, or None
            ([`~hf_unigd.UniGDProcessor.find_reserved`]). If given, a row with such a text is refused.
    """

    count_tokens: Callable[[str], int]
    short_caption_max_tokens: int = 30
    long_caption_max_tokens: int = 500
    image_folder: str | Path | None = None
    max_image_pixels: int = MAX_PIXELS
    splitter: SentenceSplitter | None = None
    requires_match: bool = True
    find_reserved: Callable[[str], str | None] | None = None

    def __call__(self, row: Mapping[str, Any], index: int) -> Example:
        """
        Args:
            row: Values by column name.
            index: Index of the row in the dataset.

        Raises:
            RowError: the row has no usable columns, or one of them is empty, corrupt, too long or inconsistent.
        """
        if not isinstance(row, Mapping):
            raise RowError(index, f"is a {type(row).__name__}, and a row is a dict of its columns.")
        example = self._parse(row, index)
        self._check_texts(example)
        if self.splitter is not None:
            try:
                example.slices = slices_of(example.anchor, example.target, self.splitter)
            except ValueError as error:
                raise RowError(index, f"{error}.") from error
        return example

    def _check_texts(self, example: Example) -> None:
        """Raises if a tokenizer would read a part of a text as an image, the end of a sequence, or a soft prompt."""
        if self.find_reserved is None:
            return
        sequences = [example.anchor, example.positive or [], *example.negatives]
        texts = [part["text"] for sequence in sequences for _, part in iter_parts(sequence) if part["type"] == "text"]
        for text in [*texts, example.target or ""]:
            reserved = self.find_reserved(text)
            if reserved is not None:
                raise RowError(
                    example.row,
                    f"has the reserved token {reserved!r} in the text {_shortened(text, reserved)!r}, which the model "
                    "would not read as text. Remove it from the row.",
                )

    def _parse(self, row: Mapping[str, Any], index: int) -> Example:
        row = {name: value for name, value in row.items() if value is not None}
        try:
            for name in ("video", "videos"):
                if row.get(name):
                    raise ValueError(f"has a video in `{name}`, but only images and texts are supported")
            if "messages" in row:
                return self._from_messages(row, index)
            if "conversations" in row:
                return self._from_conversations(row, index)
            if "anchor" in row and ("positive" in row or not self.requires_match):
                negatives = [name for name in row if name == "negative" or name.startswith("negative_")]
                return Example(
                    row=index,
                    anchor=self._user_turn(row["anchor"], "anchor"),
                    positive=self._user_turn(row["positive"], "positive") if "positive" in row else None,
                    negatives=[self._user_turn(row[name], name) for name in negatives],
                )
            if "image" in row:
                return self._from_captions(row, index)
        except ValueError as error:
            raise RowError(index, f"{error}.") from error
        raise RowError(index, f"has no usable columns, only {sorted(row)}. The accepted formats are:\n{ACCEPTED}")

    def _from_captions(self, row, index) -> Example:
        image = self._open_image(row["image"])
        short, long = row.get("short_caption"), row.get("long_caption")
        if "caption" in row and short is None and long is None:
            caption = _caption(row["caption"], "caption")
            if self.count_tokens(caption) < self.short_caption_max_tokens:
                short = caption
            else:
                long = caption
        if short is None and long is None and self.requires_match:
            raise ValueError("has an image without `short_caption`, `long_caption` or `caption`")
        short = None if short is None else _caption(short, "short_caption")
        long = None if long is None else _caption(long, "long_caption")
        for name, text in (("short_caption", short), ("long_caption", long)):
            length = 0 if text is None else self.count_tokens(text)
            if length > self.long_caption_max_tokens:
                raise ValueError(
                    f"has a `{name}` of {length} tokens, more than `long_caption_max_tokens="
                    f"{self.long_caption_max_tokens}`; shorten it or raise the limit"
                )
        return Example(
            row=index,
            anchor=_turn([{"type": "image", "image": image}]),
            positive=None if short is None else _turn([{"type": "text", "text": short}]),
            target=long,
        )

    def _from_conversations(self, row, index) -> Example:
        messages = []
        for turn in row["conversations"]:
            if turn.get("from") not in _ROLES:
                raise ValueError(
                    f"has a turn from {turn.get('from')!r} in `conversations`; `from` must be one of {sorted(_ROLES)}"
                )
            messages.append({"role": _ROLES[turn["from"]], "content": turn["value"]})
        images = [row["image"]] if "image" in row else []
        return self._from_messages({"messages": messages, "images": images}, index)

    def _from_messages(self, row, index) -> Example:
        messages = self._messages(row["messages"], list(row.get("images", [])), "messages")
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
        positives = row.get("positive_messages") or []
        if positives and isinstance(positives[0], list):
            if len(positives) > 1:
                raise ValueError(f"has {len(positives)} conversations in `positive_messages`; give one per row")
            positives = positives[0]
        negatives = row.get("negative_messages") or []
        if negatives and not isinstance(negatives[0], list):
            negatives = [negatives]
        if not positives and target is None and self.requires_match and self.splitter is None:
            raise ValueError("has neither an assistant's answer nor `positive_messages`, so there is nothing to learn")
        return Example(
            row=index,
            anchor=messages,
            positive=self._messages(positives, [], "positive_messages") if positives else None,
            negatives=[self._messages(negative, [], "negative_messages") for negative in negatives],
            target=target,
            prompted=bool(positives),
        )

    def _messages(self, messages, images, name) -> Messages:
        """Returns the messages with their image placeholders replaced by `images`, in order."""
        if not messages:
            raise ValueError(f"has an empty `{name}`")
        turns = []
        for turn in messages:
            content = turn.get("content")
            parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
            turns.append({"role": turn["role"], "content": [piece for part in parts for piece in _split(part)]})
        placeholders = sum(_is_placeholder(part) for _, part in iter_parts(turns))
        if images and not placeholders:  # as in TRL, images without a placeholder come first in the first user's turn
            first = next((turn for turn in turns if turn["role"] == "user"), turns[0])
            first["content"] = [{"type": "image"} for _ in images] + first["content"]
            placeholders = len(images)
        if placeholders != len(images):
            raise ValueError(
                f"has {placeholders} image placeholders in `{name}`, but the number of images is {len(images)}"
            )
        filling = iter(images)
        for turn in turns:
            turn["content"] = [
                self._part(next(filling) if _is_placeholder(part) else part, turn["role"], name)
                for part in turn["content"]
            ]
        return turns

    def _part(self, part, role, name):
        if isinstance(part, dict) and part.get("type") == "text":
            if not part["text"].strip():
                raise ValueError(f"has an empty text in the {role}'s turn of `{name}`")
            return {"type": "text", "text": part["text"]}
        if isinstance(part, dict) and part.get("type") not in ("image", None):
            raise ValueError(
                f"has a part of type {part['type']!r} in `{name}`, but only images and texts are supported"
            )
        if isinstance(part, dict) and part.get("type") == "image":
            part = next(part[key] for key in ("image", "path", "url") if part.get(key) is not None)
        return {"type": "image", "image": self._open_image(part)}

    def _open_image(self, value):
        return open_image(value, self.image_folder, self.max_image_pixels)

    def _user_turn(self, value, name) -> Messages:
        """Returns a user's turn that holds one text, one image, or a list of both."""
        slices = value if isinstance(value, list) else [value]
        if not slices:
            raise ValueError(f"has an empty `{name}`")
        return _turn(
            [
                {"type": "text", "text": _caption(part, name)}
                if isinstance(part, str)
                else {"type": "image", "image": self._open_image(part)}
                for part in slices
            ]
        )


def _turn(content) -> Messages:
    return [{"role": "user", "content": content}]


def _shortened(text: str, part: str) -> str:
    """The text around `part`."""
    start = text.index(part)
    return text[max(0, start - 20) : start + len(part) + 20]


def _caption(value, name) -> str:
    if isinstance(value, list):
        raise ValueError(
            f"has a list of {len(value)} texts in `{name}`; give one per row (flatten the column with `Dataset.map`)"
        )
    if not isinstance(value, str):
        raise ValueError(f"has a `{name}` of type {type(value).__name__}, but a text is needed")
    if not value.strip():
        raise ValueError(f"has an empty `{name}`")
    return value.strip()


def _split(part):
    """Splits a text part at its image tags. Every tag becomes an image part."""
    part = {key: value for key, value in part.items() if value is not None}
    if part.get("type") != "text" or _IMAGE_TAG not in part["text"]:
        return [part]
    pieces: list[dict] = []
    for place, text in enumerate(part["text"].split(_IMAGE_TAG)):
        if place:
            pieces.append({"type": "image"})
        if text.strip():
            pieces.append({"type": "text", "text": text.strip()})
    return pieces


def _is_placeholder(part) -> bool:
    return part.get("type") == "image" and not any(part.get(key) for key in ("image", "path", "url"))
