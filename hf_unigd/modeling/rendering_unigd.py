"""Renders sequences of texts and images as the strings that the backbone's processor tokenizes.

Images and texts keep their order. A chat template that puts all images of a turn first gets a turn in which a text
comes before an image as one text, in which placeholders stand for the images. Marks show where a text slice ends in
the rendered string, and where an earlier answer that is learned starts and ends. They are then removed.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from jinja2 import TemplateError
from PIL import Image

from .chat_template_unigd import ChatTemplate
from .images_unigd import ImageError, open_image
from .instructions_unigd import is_instruction


# Code points that no text may contain.
_SLICE_END, _ANSWER_START, _ANSWER_END = _MARKS = "\ufdd0\ufdd1\ufdd2"


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
class EarlierAnswer:
    """
    A text of an answer that the conversation goes on after.

    Attributes:
        start, end (`int`): Where it is, in characters of the prompt. What the template renders to begin and end a
            last answer is included, as far as it renders it here.
        unrendered (`str`): The rest of what ends a last answer, which the template does not render here.
    """

    start: int
    end: int
    unrendered: str


@dataclass(frozen=True)
class RenderedSequence:
    """
    Attributes:
        prompt (`str`): The rendered conversation, up to where the answer starts.
        images (`list[PIL.Image.Image]`): Its images, in order.
        answer (`str`): The rendered target, which continues `prompt`. It is empty without a target.
        slice_ends (`list[int]`): Where each text slice ends, in characters of `prompt + answer`.
        history (`list[EarlierAnswer]`): The answers in `prompt` that are learned, in order.
    """

    prompt: str
    images: list[Image.Image]
    answer: str
    slice_ends: list[int]
    history: list[EarlierAnswer]


class SequenceRenderer:
    """Renders sequences with the chat template of a backbone's processor.

    Args:
        vlm_processor (`ProcessorMixin`): The backbone's processor.
    """

    def __init__(self, vlm_processor):
        self.vlm_processor = vlm_processor
        self.template = ChatTemplate(vlm_processor)

    def render(
        self,
        index: int,
        sequence,
        target: str | None = None,
        prompts: dict[str, str] | None = None,
        sentence_ends: Callable[[str], list[int]] | None = None,
        label_history: bool = False,
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
            label_history (`bool`, *optional*, defaults to `False`): Whether to find the answers in the sequence.

        Raises:
            SequenceError: if the sequence or the target cannot be rendered, or the template changes an answer of the
                history.
            ValueError: if the chat template cannot continue a prompt with an answer.
        """
        turns, images = self._to_turns(index, sequence, sentence_ends)
        if prompts is not None:
            _append_text(turns[-1]["content"], prompts["image" if images else "text"], separator="\n")
        if label_history:
            turns = [_mark_answer(turn) if turn["role"] == "assistant" else turn for turn in turns]
        conversation, marked_answer = turns, ""
        try:
            marked = self._apply_template(turns, add_generation_prompt=True)
            if target is not None:
                if not target.strip():
                    raise SequenceError(index, "has an empty target.")
                self._check_text(index, target, "target")
                answer = {"type": "text", "text": _mark_ends(target, sentence_ends)}
                conversation = [*turns, {"role": "assistant", "content": [answer]}]
                marked_answer = self._answer(conversation, marked)
            text, places = _take_marks(marked + marked_answer)
            self._check_marks(index, conversation, places)
            history = self._history(index, turns, text, places) if label_history else []
        except TemplateError as error:
            raise SequenceError(index, f"is refused by the chat template: {error}") from error
        prompt, _ = _take_marks(marked)
        return RenderedSequence(prompt, images, text[len(prompt) :], places[_SLICE_END], history)

    @cached_property
    def reserved_tokens(self) -> list[str]:
        """What no text may contain, because the tokenizer would read it as a token of control: placeholders of images
        and videos, marks of turns, the end of a sequence, soft prompts."""
        processor, tokenizer = self.vlm_processor, self.vlm_processor.tokenizer
        tokens = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        tokens |= set(tokenizer.all_special_tokens) | set(processor.all_special_multimodal_tokens)
        return sorted((token for token in tokens if token), key=len, reverse=True)

    def find_reserved(self, text: str) -> str | None:
        """The first of the [`reserved_tokens`] in a text, if there is one."""
        found = self._reserved.search(text)
        return None if found is None else found[0]

    @cached_property
    def _reserved(self) -> re.Pattern:
        return re.compile("|".join(map(re.escape, [*self.reserved_tokens, *_MARKS])))

    def _check_marks(self, index, turns, places: dict[str, list[int]]) -> None:
        """Raises if the template does not render every marked text once."""
        texts = [part["text"] for turn in turns for part in turn["content"] if part["type"] == "text"]
        for mark in (_ANSWER_START, _ANSWER_END, _SLICE_END):
            given, rendered = sum(text.count(mark) for text in texts), len(places[mark])
            if given == rendered:
                continue
            if mark == _SLICE_END:
                reason = f"has {given} text slices, but the chat template renders {rendered} of them"
                raise SequenceError(index, f"{reason}. Use a template that renders every text once.")
            raise SequenceError(
                index,
                "holds an earlier answer that the chat template changes, perhaps by removing its thoughts, so that it "
                "cannot be learned where it is. Learn the last answer alone (`mask_history=True` in training), or use "
                "a template that renders every answer as it is.",
            )

    def _history(self, index, turns, text: str, places: dict[str, list[int]]) -> list[EarlierAnswer]:
        """The texts of the answers in the turns. An image in an answer is not learned."""
        found = []
        starts, ends = iter(places[_ANSWER_START]), iter(places[_ANSWER_END])
        for content in (turn["content"] for turn in turns if turn["role"] == "assistant"):
            for place, part in enumerate(content):
                if part["type"] != "text":
                    continue
                start, end, unrendered = next(starts), next(ends), ""
                if place == 0 and text.endswith(self.template.before_answer, 0, start):
                    start -= len(self.template.before_answer)
                if place == len(content) - 1:
                    closing, unrendered = self.template.after_answer
                    space = len(text) - end - len(text[end:].lstrip())
                    if not text.startswith(closing, end + space):
                        raise SequenceError(
                            index, f"holds an answer that the chat template ends otherwise than with {closing!r}."
                        )
                    end += space + len(closing) if closing else 0
                found.append(EarlierAnswer(start, end, unrendered))
        return found

    def _answer(self, turns, marked: str) -> str:
        """What the template renders after `marked` once the last of the turns has answered.

        Raises:
            ValueError: if no answer can follow `marked`.
        """
        answered = self._apply_template(turns)
        if answered.startswith(marked):
            answer = answered[len(marked) :].rstrip()
        else:
            # Some templates end with another white space before an answer that is there than before one that is not.
            *earlier, last = turns
            start = {"type": "text", "text": _SLICE_END + last["content"][0]["text"]}
            parts = self._apply_template([*earlier, {**last, "content": [start]}]).split(_SLICE_END)
            place = marked.count(_SLICE_END) + 1
            if _SLICE_END.join(parts[:place]).rstrip() != marked.rstrip():
                raise ValueError(
                    "The chat template renders a conversation differently once it is answered, so that no answer can "
                    "follow the prompt. Use a template that only appends to what it renders with "
                    "`add_generation_prompt=True`."
                )
            answer = _SLICE_END.join(parts[place:]).rstrip()
        return self.template.end(answer)

    def _to_turns(self, index, sequence, sentence_ends):
        """The turns, with a list of parts as the content of each, and the images in order."""
        slices = sequence if isinstance(sequence, (list, tuple)) else [sequence]
        if not slices:
            raise SequenceError(index, "is empty: it needs at least one text or image.")
        if not isinstance(slices[0], dict):
            slices = [{"role": "user", "content": list(slices)}]
        if slices[-1]["role"] != "user":
            raise SequenceError(index, f"ends with the role {slices[-1]['role']!r}; it must end with the user's turn.")
        images: list[Image.Image] = []
        turns = [
            {**turn, "content": self._to_parts(index, turn["role"], turn["content"], images, sentence_ends)}
            for turn in slices
        ]
        return turns, images

    def _to_parts(self, index, role, content, images, sentence_ends) -> list[dict]:
        """The parts of one turn, with marks after text slices. Neighbouring texts are joined. Appends to `images`."""
        parts: list[dict] = []
        for part in [content] if isinstance(content, str) else content:
            given = part
            if isinstance(part, dict):
                part = part.get("image", part.get("text"))
            if isinstance(part, Image.Image):
                try:
                    images.append(open_image(part))
                except ImageError as error:
                    raise SequenceError(index, str(error)) from error
                parts.append({"type": "image"})
            elif isinstance(part, str):
                if not part.strip():
                    raise SequenceError(index, "holds an empty text.")
                self._check_text(index, part, "text")
                # The system's text is not a slice, and neither is an instruction.
                is_slice = role != "system" and not is_instruction(given)
                _append_text(parts, _mark_ends(part, sentence_ends) if is_slice else part, separator=" ")
            else:
                kind = given.get("type") if isinstance(given, dict) else type(given).__name__
                raise SequenceError(index, f"holds a {kind}; each part must be a text or a PIL image.")
        if not parts:
            raise SequenceError(index, "holds an empty turn: it needs at least one text or image.")
        return parts

    def _check_text(self, index, text: str, name: str) -> None:
        reserved = self.find_reserved(text)
        if reserved is not None:
            raise SequenceError(
                index,
                f"holds the reserved token {reserved!r} inside a {name}. Remove it from the {name}; pass images as "
                "parts of the sequence, in their place.",
            )

    def _apply_template(self, turns, add_generation_prompt=False) -> str:
        turns = [{**turn, "content": self._in_template_order(turn["content"])} for turn in turns]
        return self.template.render(turns, add_generation_prompt)

    def _in_template_order(self, parts: list[dict]) -> list[dict]:
        """The parts of a turn, if the template renders them in order. If not, one text with them in order, in which
        placeholders stand for the images."""
        types = [part["type"] for part in parts]
        if self.template.keeps_order or types == sorted(types):  # an image before a text
            return parts
        placeholder, text = self.template.image_placeholder, ""
        for part in parts:
            if part["type"] == "text":
                text += part["text"]
            else:
                text += placeholder if not text or text.endswith(placeholder) else f"\n{placeholder}"
        return [{"type": "text", "text": text}]


def _append_text(parts: list[dict], text: str, separator: str) -> None:
    """Adds a text to the parts of a turn: to its last part, if that is a text."""
    if parts and parts[-1]["type"] == "text":
        text = parts.pop()["text"] + separator + text
    parts.append({"type": "text", "text": text})


def _mark_ends(text: str, sentence_ends) -> str:
    """`text` with a mark after each of its slices."""
    ends = [len(text.rstrip())] if sentence_ends is None else sentence_ends(text)
    starts = [0, *ends]
    pieces = [text[start:end] for start, end in zip(starts, [*ends, len(text)], strict=True)]
    return _SLICE_END.join(pieces)


def _mark_answer(turn: dict) -> dict:
    """An assistant's turn with marks around its texts, but not around white space, which a template may trim."""
    content = []
    for part in turn["content"]:
        if part["type"] == "text":
            text = part["text"].strip()
            before, _, after = part["text"].partition(text)
            part = {**part, "text": f"{before}{_ANSWER_START}{text}{_ANSWER_END}{after}"}
        content.append(part)
    return {**turn, "content": content}


def _take_marks(marked: str) -> tuple[str, dict[str, list[int]]]:
    """A text without its marks, and the places of each kind of them, in characters of that text."""
    places: dict[str, list[int]] = {mark: [] for mark in _MARKS}
    text = ""
    for piece in re.split(f"([{_MARKS}])", marked):
        if piece in places:
            places[piece].append(len(text))
        else:
            text += piece
    return text, places
