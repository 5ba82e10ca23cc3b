"""Reads chats as their owners write them: TRL's and ms-swift's messages, and LLaVA's conversations."""

from collections.abc import Callable
from typing import Any

from PIL import Image

from .example import Messages, iter_parts


# TRL's and LLaVA's data mark an image inside a text with this tag, whatever the image token of the model is.
IMAGE_TAG = "<image>"
_ROLES = ("system", "user", "assistant")
_LLAVA_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_IMAGE_KEYS = ("image", "path", "url")
# What a turn can hold that would change what is learned.
_UNSUPPORTED_KEYS = ("tool_calls", "loss", "weight")


def from_llava(conversation: Any, name: str = "conversations") -> list[dict[str, Any]]:
    """LLaVA's turns as messages with roles. `name` is that of the column, for errors.

    Raises:
        ValueError: they are not turns with `from` and `value`. The message continues "Row 3 ...".
    """
    messages = []
    for turn in _checked_turns(conversation, name):
        role = turn.get("from")
        if not isinstance(role, str) or role not in _LLAVA_ROLES:
            raise ValueError(f"has a turn from {role!r} in `{name}`; `from` must be one of {sorted(_LLAVA_ROLES)}")
        if not isinstance(turn.get("value"), str):
            raise ValueError(f"has a turn in `{name}` whose `value` is a {type(turn.get('value')).__name__}")
        messages.append({"role": _LLAVA_ROLES[role], "content": turn["value"]})
    return messages


def only_answer(conversation: Any, name: str) -> str:
    """
    The answer of a conversation that asks for a caption, as those of ShareGPT-4V do.

    Args:
        conversation: LLaVA's turns.
        name: Name of the column, for errors.

    Raises:
        ValueError: there are no such turns, or not exactly one answer. The message continues "Row 3 ...".
    """
    answers = [turn["content"] for turn in from_llava(conversation, name) if turn["role"] == "assistant"]
    if len(answers) != 1:
        raise ValueError(f"has a conversation with {len(answers)} answers in `{name}`; a caption is the only answer")
    return answers[0]


def read_chat(messages: Any, images: Any, name: str, open_image: Callable[[Any], Image.Image]) -> Messages:
    """
    Reads a chat, and puts the images in the places of its placeholders, in order.

    Args:
        messages: Turns with `role` and `content`: a text, or a list of parts. A placeholder is `{"type": "image"}` or
            `<image>` in a text.
        images: A list of images, or a single one. Without any placeholder, they come first in the first user's turn,
            as in TRL.
        name: Name of the column, for errors.
        open_image: Opens an image, in whatever form it comes.

    Raises:
        ValueError: the chat has another form, or another number of placeholders than of images. The message continues
            "Row 3 ...".
    """
    turns = [_read_turn(turn, name) for turn in _checked_turns(messages, name)]
    images = as_list(images)
    placeholders = sum(part == {"type": "image"} for _, part in iter_parts(turns))
    if images and not placeholders:
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
            part
            if part["type"] == "text"
            else {"type": "image", "image": open_image(part["image"] if "image" in part else next(filling))}
            for part in turn["content"]
        ]
    return turns


def read_chats(value: Any, images: Any, name: str, open_image: Callable[[Any], Image.Image]) -> list[Messages]:
    """
    Reads a list of chats, or a single one.

    Args:
        value: The chats.
        images: A list of images for each, or for a single chat its images.
        name, open_image: As in [`read_chat`].

    Raises:
        ValueError: as in [`read_chat`], or the numbers of chats and of lists of images differ.
    """
    chats, lists = as_list(value), as_list(images)
    if chats and not isinstance(chats[0], (list, tuple)):
        chats = [chats]
        lists = lists if lists and isinstance(lists[0], (list, tuple)) else [lists]
    lists = lists or [[] for _ in chats]
    if len(chats) != len(lists):
        raise ValueError(f"has {len(chats)} chats in `{name}`, but {len(lists)} lists of images for them")
    return [read_chat(chat, listed, name, open_image) for chat, listed in zip(chats, lists, strict=True)]


def _checked_turns(value: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"has `{name}` of type {type(value).__name__}, but a list of turns is needed")
    if not value:
        raise ValueError(f"has an empty `{name}`")
    for turn in value:
        if not isinstance(turn, dict):
            raise ValueError(f"has a turn of type {type(turn).__name__} in `{name}`, but a dict is needed")
    return list(value)


def _read_turn(turn: dict[str, Any], name: str) -> dict[str, Any]:
    role, content = turn.get("role"), turn.get("content")
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError(f"has a turn with the role {role!r} in `{name}`; it must be one of {', '.join(_ROLES)}")
    for key in _UNSUPPORTED_KEYS:
        if turn.get(key) not in (None, [], True, 1):
            raise ValueError(f"has a turn with `{key}` in `{name}`, which is not supported; remove it from the turn")
    if not isinstance(content, (str, list, tuple)):
        raise ValueError(f"has a turn in `{name}` whose `content` is a {type(content).__name__}")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    read = [piece for part in parts for piece in _read_part(part, role, name)]
    if not read:
        raise ValueError(f"has a turn without content in `{name}`")
    return {"role": role, "content": read}


def _read_part(part: Any, role: str, name: str) -> list[dict[str, Any]]:
    """Returns texts `{"type": "text", "text": ...}`, images `{"type": "image", "image": ...}`, which are not opened,
    and placeholders `{"type": "image"}`."""
    if not isinstance(part, dict):
        raise ValueError(
            f"has a part of type {type(part).__name__} in `{name}`; a part is a dict, for example "
            '{"type": "text", "text": "..."}'
        )
    part = {key: value for key, value in part.items() if value is not None}
    kind, given = part.get("type"), [key for key in ("text", *_IMAGE_KEYS) if key in part]
    if kind not in ("text", "image"):
        raise ValueError(f"has a part of type {kind!r} in `{name}`, but only images and texts are supported")
    if kind == "text" and given == ["text"]:
        if not isinstance(part["text"], str):
            raise ValueError(f"has a text of type {type(part['text']).__name__} in `{name}`")
        return _split_at_tags(part["text"], role, name)
    if kind == "image" and len(given) <= 1 and "text" not in given:
        return [{"type": "image"} | ({"image": part[given[0]]} if given else {})]
    raise ValueError(f"has a part of type {kind!r} with {' and '.join(map(repr, given)) or 'no text'} in `{name}`")


def _split_at_tags(text: str, role: str, name: str) -> list[dict[str, Any]]:
    """A text in pieces. Every image tag becomes a placeholder."""
    if IMAGE_TAG not in text:
        if not text.strip():
            raise ValueError(f"has an empty text in the {role}'s turn of `{name}`")
        return [{"type": "text", "text": text}]
    pieces: list[dict[str, Any]] = []
    for place, piece in enumerate(text.split(IMAGE_TAG)):
        if place:
            pieces.append({"type": "image"})
        if piece.strip():
            pieces.append({"type": "text", "text": piece.strip()})
    return pieces


def as_list(value: Any) -> list:
    """A list of what may come alone. None is an empty one."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
