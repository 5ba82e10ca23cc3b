"""Renders sequences of texts and images as the strings that the backbone's processor tokenizes.

Many chat templates put all images of a turn first. Here each image is replaced by its placeholder before the template
is rendered, so that images and texts keep their order. A mark after each text slice shows where the slice ends in the
rendered string, and is then removed.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from PIL import Image


# A code point that no text may contain.
_SLICE_END = "\ufdd0"


class SequenceError(ValueError):
    """A sequence cannot be processed.

    Attributes:
        index (`int`): Index of the sequence in the batch.
        reason (`str`): What is wrong with it.
    """

    def __init__(self, index: int, reason: str):
        super().__init__(f"Sequence {index} {reason}")
        self.index = index
        self.reason = reason

    def __reduce__(self):  # by default, exceptions are unpickled with the message as their only argument
        return type(self), (self.index, self.reason)


@dataclass(frozen=True)
class RenderedSequence:
    """
    Attributes:
        prompt (`str`): The rendered conversation, up to where the answer starts.
        images (`list[PIL.Image.Image]`): Its images, in order.
        answer (`str`): The rendered target, which continues `prompt`. It is empty without a target.
        slice_ends (`list[int]`): Where each text slice ends, in characters of `prompt + answer`.
    """

    prompt: str
    images: list[Image.Image]
    answer: str
    slice_ends: list[int]


class SequenceRenderer:
    """Renders sequences with the chat template of a backbone's processor.

    Args:
        vlm_processor (`ProcessorMixin`): The backbone's processor.
    """

    def __init__(self, vlm_processor):
        self.vlm_processor = vlm_processor

    def render(
        self,
        index: int,
        sequence,
        target: str | None = None,
        prompts: dict[str, str] | None = None,
        sentence_ends: Callable[[str], list[int]] | None = None,
    ) -> RenderedSequence:
        """
        Args:
            index (`int`): Index of the sequence in the batch, for errors.
            sequence: A text, an image, a list of both, or chat messages.
            target (`str`, *optional*): The answer to the sequence.
            prompts (`dict[str, str]`, *optional*): The embedding prompts by modality. The last turn ends with the one
                for `"image"` if the sequence has an image, and with the one for `"text"` otherwise.
            sentence_ends (`Callable[[str], list[int]]`, *optional*): Returns where the sentences of a text end.
                Without it, each text is one slice.

        Raises:
            SequenceError: if the sequence or the target cannot be rendered.
            ValueError: if the chat template cannot continue a prompt with an answer.
        """
        messages, images = self._to_messages(index, sequence, sentence_ends)
        if prompts is not None:
            *earlier, last = messages
            separator = "" if last["content"].endswith(self.image_placeholder) else "\n"
            prompt = prompts["image" if images else "text"]
            messages = [*earlier, {**last, "content": last["content"] + separator + prompt}]
        marked = self._apply_template(messages, add_generation_prompt=True)
        marked_answer, marks = "", sum(turn["content"].count(_SLICE_END) for turn in messages)
        if target is not None:
            if not target.strip():
                raise SequenceError(index, "has an empty target.")
            answer = _mark_ends(target, sentence_ends)
            marks += answer.count(_SLICE_END)
            answered = self._apply_template([*messages, {"role": "assistant", "content": answer}])
            if not answered.startswith(marked):
                raise ValueError(
                    "The chat template renders a conversation differently once it is answered, so that no answer can "
                    "follow the prompt. Use a template that only appends to what it renders with "
                    "`add_generation_prompt=True`."
                )
            marked_answer = answered[len(marked) :].rstrip()
            eos_token = self.vlm_processor.tokenizer.eos_token
            marked_answer = marked_answer if marked_answer.endswith(eos_token) else marked_answer + eos_token
        pieces = (marked + marked_answer).split(_SLICE_END)
        if len(pieces) != marks + 1:
            raise SequenceError(
                index,
                f"has {marks} text slices, but the chat template renders {len(pieces) - 1} of them. Use a template "
                "that renders every text once.",
            )
        slice_ends = list(accumulate(len(piece) for piece in pieces[:-1]))
        return RenderedSequence(
            marked.replace(_SLICE_END, ""), images, marked_answer.replace(_SLICE_END, ""), slice_ends
        )

    @cached_property
    def image_placeholder(self) -> str:
        """What the chat template renders for an image: the difference between a turn with an image and one without.

        Raises:
            ValueError: if it does not contain the image token of the backbone's processor.
        """
        text = {"type": "text", "text": "@"}
        rendered = [
            self.vlm_processor.apply_chat_template([{"role": "user", "content": content}])
            for content in ([{"type": "image"}, text], [text])
        ]
        start = len(os.path.commonprefix(rendered))  # noqa: RUF071
        placeholder = rendered[0][start : start + len(rendered[0]) - len(rendered[1])]
        if self.vlm_processor.image_token not in placeholder:
            raise ValueError(
                f"The chat template renders an image as {placeholder!r}, without the processor's image token "
                f"{self.vlm_processor.image_token!r}."
            )
        return placeholder

    def _to_messages(self, index, sequence, sentence_ends):
        """The messages, with one string as the content of each, and the images in order."""
        slices = sequence if isinstance(sequence, (list, tuple)) else [sequence]
        if not slices:
            raise SequenceError(index, "is empty: it needs at least one text or image.")
        if not isinstance(slices[0], dict):
            slices = [{"role": "user", "content": list(slices)}]
        if slices[-1]["role"] != "user":
            raise SequenceError(index, f"ends with the role {slices[-1]['role']!r}; it must end with the user's turn.")
        images: list[Image.Image] = []
        messages = [
            {**turn, "content": self._to_string(index, turn["role"], turn["content"], images, sentence_ends)}
            for turn in slices
        ]
        return messages, images

    def _to_string(self, index, role, content, images, sentence_ends):
        """The content of one turn, with placeholders for images and marks after text slices. Appends to `images`."""
        text, previous = "", None
        for part in [content] if isinstance(content, str) else content:
            if isinstance(part, dict):
                part = part.get("image", part.get("text"))
            if isinstance(part, Image.Image):
                images.append(part)
                # Two images need a separator, because their tokens would otherwise look like those of one image.
                touches = previous == "image" and self.image_placeholder.strip() == self.image_placeholder
                text += ("\n" if previous == "text" or touches else "") + self.image_placeholder
                previous = "image"
            elif isinstance(part, str):
                if not part.strip():
                    raise SequenceError(index, "holds an empty text.")
                for forbidden, name in ((self.vlm_processor.image_token, "image placeholder"), (_SLICE_END, "marker")):
                    if forbidden in part:
                        raise SequenceError(
                            index,
                            f"holds the {name} {forbidden!r} inside a text. Remove it from the text; pass images as "
                            "parts of the sequence, in their place.",
                        )
                # The system's text is not a slice.
                marked = part if role == "system" else _mark_ends(part, sentence_ends)
                text += (" " if previous == "text" else "") + marked
                previous = "text"
            else:
                raise SequenceError(index, f"holds a {type(part).__name__}; each part must be a text or a PIL image.")
        if previous is None:
            raise SequenceError(index, "holds an empty turn: it needs at least one text or image.")
        return text

    def _apply_template(self, messages, add_generation_prompt=False) -> str:
        messages = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in messages]
        return self.vlm_processor.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)


def _mark_ends(text: str, sentence_ends) -> str:
    """`text` with a mark after each of its slices."""
    ends = [len(text.rstrip())] if sentence_ends is None else sentence_ends(text)
    starts = [0, *ends]
    pieces = [text[start:end] for start, end in zip(starts, [*ends, len(text)], strict=True)]
    return _SLICE_END.join(pieces)
