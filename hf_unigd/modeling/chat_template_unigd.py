"""What a backbone's chat template does with images and dates, found by rendering it."""

import logging
import os
import re
from datetime import datetime
from functools import cached_property


logger = logging.getLogger(__name__)

MAX_CHARACTERS = 1 << 20
_DATE = re.compile(r"strftime_now\(\s*(?P<quote>['\"])(?P<format>.*?)(?P=quote)\s*\)")


class ChatTemplate:
    """The chat template of a backbone's processor.

    Args:
        vlm_processor (`ProcessorMixin`): The backbone's processor.

    Raises:
        ValueError: if the template cannot be rendered, or renders no image token for an image.
    """

    def __init__(self, vlm_processor):
        self.vlm_processor = vlm_processor
        try:
            self.image_placeholder  # noqa: B018 - renders it, and keeps it
        except Exception as error:  # a template is a program
            raise ValueError(f"The chat template cannot be rendered for an image and a text: {error}") from error
        if vlm_processor.image_token not in self.image_placeholder:
            raise ValueError(
                f"The chat template renders an image as {self.image_placeholder!r}, without the processor's image "
                f"token {vlm_processor.image_token!r}."
            )

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        """
        Args:
            messages (`list[dict]`): Turns with a `role` and a `content`, which is a list of `{"type": "image"}` and
                `{"type": "text", "text": str}`.
            add_generation_prompt (`bool`, *optional*, defaults to `False`): End with what an answer follows.

        Raises:
            jinja2.TemplateError: if the template refuses the messages.
        """
        return self.vlm_processor.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)

    @cached_property
    def keeps_order(self) -> bool:
        """Whether a turn's images and texts are rendered in their order. Many templates put all images first."""
        rendered = self.render([_turn("@1", None, "@2", None, "@3")])
        texts = [re.findall("@[123]", part) for part in rendered.split(self.vlm_processor.image_token)]
        return texts == [["@1"], ["@2"], ["@3"]]

    @cached_property
    def image_placeholder(self) -> str:
        """What is rendered for an image: what a second image adds to a turn with one."""
        one, two = self.render([_turn(None, "@")]), self.render([_turn(None, None, "@")])
        if len(two) > MAX_CHARACTERS:  # tokenizing it could take all memory
            raise ValueError(f"it makes {len(two):,} characters of two images and a letter")
        start = len(os.path.commonprefix([one, two]))  # noqa: RUF071
        return two[start : start + len(two) - len(one)]

    def end(self, answer: str) -> str:
        """A rendered last answer, which always ends with the EOS token."""
        eos_token = self.vlm_processor.tokenizer.eos_token
        return answer if answer.endswith(eos_token) else answer + eos_token

    @cached_property
    def before_answer(self) -> str:
        """What is rendered between the generation prompt and the text of an answer that the conversation goes on
        after. It is empty if the template begins such an answer in another way than the generation prompt does."""
        prompt = self.render([_turn("@1")], add_generation_prompt=True)
        begin, _, _ = self.render(_CONVERSATION).partition("@2")
        return begin[len(prompt) :] if begin.startswith(prompt) else ""

    @cached_property
    def after_answer(self) -> tuple[str, str]:
        """How an answer ends that the conversation goes on after: what is rendered after its text, of that with which
        a last answer ends, and the rest of it, which is not rendered there."""
        _, _, goes_on = self.render(_CONVERSATION).partition("@2")
        _, _, last = self.render(_CONVERSATION[:2]).partition("@2")
        last = last.rstrip()
        whole = self.end(last)
        rendered = next(each for each in (whole, last, "") if goes_on.startswith(each))
        return rendered.strip(), whole[len(rendered) :]


def freeze_dates(template):
    """
    Replaces calls of `strftime_now` in a chat template, or in several by name, by today's date, with a warning: a
    checkpoint must make the same inputs tomorrow.

    Raises:
        ValueError: a format is not written in the call, so that the date cannot be replaced.
    """
    if isinstance(template, dict):
        return {name: freeze_dates(each) for name, each in template.items()}
    if "strftime_now(" not in template:
        return template
    now = datetime.now()
    frozen = _DATE.sub(lambda call: repr(now.strftime(call["format"])), template)
    if "strftime_now(" in frozen:
        raise ValueError(
            "The chat template writes the current date in a format that it computes, so its inputs would change from "
            "day to day. Replace `strftime_now(...)` in `vlm_processor.chat_template` by a fixed date."
        )
    logger.warning(
        "The chat template writes the current date. It is replaced by today's, %s, so that the checkpoint makes the "
        "same inputs on every day.",
        f"{now:%Y-%m-%d}",
    )
    return frozen


def _turn(*parts: str | None, role: str = "user") -> dict:
    """A turn. None stands for an image."""
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content}


_CONVERSATION = [_turn("@1"), _turn("@2", role="assistant"), _turn("@3")]


def holds_video(conversation) -> bool:
    """Whether a message at any depth has a part of type `"video"`."""
    if isinstance(conversation, dict):
        return conversation.get("type") == "video" or holds_video(conversation.get("content"))
    return isinstance(conversation, (list, tuple)) and any(map(holds_video, conversation))
