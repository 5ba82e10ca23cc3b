"""Turns sequences of texts and images into model inputs, with the spans to embed and the tokens to predict.

The prompts live here and are saved with the processor: the model knows nothing of them.
"""

import json
import logging
import os
from collections.abc import Callable
from functools import cached_property
from itertools import accumulate, groupby
from pathlib import Path

import torch
import transformers
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoProcessor, BatchFeature, ProcessorMixin
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import PROCESSOR_NAME

from .hub_files_unigd import find_file
from .probe_unigd import PROBE_NAME, load_probe, processor_differences


logger = logging.getLogger(__name__)

# VladVA, figure 4, names the image prompt; the text prompt is ours, by symmetry.
DEFAULT_PROMPTS = {
    "image": "Summarize the provided image in one word",
    "text": "Summarize the provided text in one word",
}

# Marks the end of a text slice while a chat template is rendered: a code point that no text may hold.
_SLICE_END = "\ufdd0"


class SequenceError(ValueError):
    """A sequence that cannot be processed. `index` is its place in the batch, `reason` says why."""

    def __init__(self, index: int, reason: str):
        super().__init__(f"Sequence {index} {reason}")
        self.index = index
        self.reason = reason


class UniGDProcessor(ProcessorMixin):
    r"""
    Wraps a backbone's processor (tokenizer, image processor, chat template) and adds what is embedded of a sequence.

    Called like the backbone's own processor it behaves like it; [`process_sequences`] prepares inputs to embed and to
    train on.

    Args:
        vlm_processor (`ProcessorMixin`): Processor of the backbone; it needs a chat template.
        prompts (`dict[str, str]`, *optional*): The hand-written prompts by modality, `"image"` (for every sequence
            that holds an image) and `"text"`. Each ends the user's turn; the embedding is read at the last token
            before the answer.
        soft_prompts (`dict[str, list[str]]`, *optional*): Reserved tokens by modality that stand in for the
            hand-written prompt; [`add_soft_prompts`] makes them.
        embedding_position (`str`, *optional*, defaults to `"prompt"`): Where a sequence is embedded. `"prompt"`: at
            the last token of its embedding prompt (VladVA). `"last_slice"`: at its last image or sentence, without a
            prompt (Sugar, section 3.2).
        image_pooling (`str`, *optional*, defaults to `"mean"`): Span of an image slice: `"mean"` of all its tokens
            (Sugar, appendix E.1), or its `"last"` token (table 4b, "w/o AvgPool").

    Raises:
        ValueError: no chat template, no padding token, prompts of unknown modalities, or an unknown choice.
    """

    def __init__(
        self, vlm_processor, prompts=None, soft_prompts=None, embedding_position="prompt", image_pooling="mean"
    ):
        if vlm_processor.chat_template is None:
            raise ValueError(
                f"{type(vlm_processor).__name__} has no chat template, which places the prompts. Set "
                "`vlm_processor.chat_template` to the one that the backbone was trained with."
            )
        if vlm_processor.tokenizer.pad_token_id is None:
            raise ValueError(
                "The tokenizer has no padding token. Set `tokenizer.pad_token`, for example to the EOS token."
            )
        prompts = {**DEFAULT_PROMPTS, **(prompts or {})}
        if prompts.keys() != DEFAULT_PROMPTS.keys():
            raise ValueError(f"`prompts` takes the keys {sorted(DEFAULT_PROMPTS)}, got {sorted(prompts)}.")
        for name, value, choices in (
            ("embedding_position", embedding_position, ("prompt", "last_slice")),
            ("image_pooling", image_pooling, ("mean", "last")),
        ):
            if value not in choices:
                raise ValueError(f"`{name}` must be one of {choices}, got {value!r}.")
        self.vlm_processor = vlm_processor
        self.prompts = prompts
        self.soft_prompts = soft_prompts
        self.embedding_position = embedding_position
        self.image_pooling = image_pooling

    # What `ProcessorMixin` declares as attributes is the backbone processor's.
    tokenizer = property(lambda self: self.vlm_processor.tokenizer)
    image_processor = property(lambda self: self.vlm_processor.image_processor)
    chat_template = property(lambda self: self.vlm_processor.chat_template)
    model_input_names = property(lambda self: [*self.vlm_processor.model_input_names, "spans"])

    def __call__(self, *args, **kwargs) -> BatchFeature:
        return self.vlm_processor(*args, **kwargs)

    def apply_chat_template(self, *args, **kwargs):
        return self.vlm_processor.apply_chat_template(*args, **kwargs)

    def batch_decode(self, *args, **kwargs):
        return self.vlm_processor.batch_decode(*args, **kwargs)

    def decode(self, *args, **kwargs):
        return self.vlm_processor.decode(*args, **kwargs)

    def post_process_image_text_to_text(self, *args, **kwargs):
        return self.vlm_processor.post_process_image_text_to_text(*args, **kwargs)

    def __repr__(self):
        settings = ", ".join(f"{name}={value!r}" for name, value in self._settings.items())
        return f"{type(self).__name__}({settings}, {self.vlm_processor})"

    def process_sequences(
        self,
        sequences: list,
        targets: list[str | None] | None = None,
        *,
        prompted: bool | list[bool] = True,
        sentence_ends: Callable[[str], list[int]] | None = None,
        max_length: int | None = None,
        padding_side: str | None = None,
    ) -> BatchFeature:
        """
        Prepares a batch of sequences of texts and images, in the order in which they are given.

        Args:
            sequences (`list`): Each a text, a `PIL.Image.Image`, a list of both (one user turn), or chat messages
                (`[{"role": ..., "content": ...}]`, images as `{"type": "image", "image": PIL.Image.Image}`).
            targets (`list[str | None]`, *optional*): Texts that the model learns to say after each sequence.
            prompted (`bool` or `list[bool]`, *optional*, defaults to `True`): Whether a sequence is embedded, and ends
                with its prompt where `embedding_position` is `"prompt"`. A sequence that is not has no span.
            sentence_ends (`Callable[[str], list[int]]`, *optional*): Where the sentences of a text end (offsets of
                characters). With it the spans of all slices are returned too: an image is a slice, and so is every
                sentence of every turn but the system's.
            max_length (`int`, *optional*): Longest row allowed, in tokens, image tokens and target included.
            padding_side (`str`, *optional*): `"left"` or `"right"`; the tokenizer's own by default.

        Returns:
            `BatchFeature` of the backbone's inputs, `spans` (`(num_prompted, 3)`: row, start, end), with `targets`
            `labels` (`(batch_size, sequence_length)`, -100 where nothing is predicted), and with `sentence_ends`
            `slice_spans` (`(num_slices, 3)`, ordered by row, then by place; the target's slices included).

        Raises:
            SequenceError: a sequence is empty, holds an empty text, an image placeholder or something that is neither
                text nor image, or is longer than `max_length`. Nothing is truncated.
        """
        flags = [prompted] * len(sequences) if isinstance(prompted, bool) else prompted
        targets = [None] * len(sequences) if targets is None else targets
        if not len(sequences) == len(flags) == len(targets):
            raise ValueError(
                f"{len(sequences)} sequences, but {len(targets)} targets and {len(flags)} values of `prompted`."
            )
        rows = [
            self._render(index, sequence, target, flag, sentence_ends)
            for index, (sequence, target, flag) in enumerate(zip(sequences, targets, flags, strict=True))
        ]
        texts, images, continuations, text_ends = map(list, zip(*rows, strict=True))

        bos_token = self.tokenizer.bos_token
        add_special_tokens = not (bos_token and texts[0].startswith(bos_token))
        batch = self.vlm_processor(
            text=list(texts),
            images=images if any(images) else None,
            add_special_tokens=add_special_tokens,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        lengths = batch["attention_mask"].sum(1).tolist()
        answers = [self._continuation(text, more)[0] for text, more in zip(texts, continuations, strict=True)]
        for index, (length, answer) in enumerate(zip(lengths, answers, strict=True)):
            if max_length is not None and length + len(answer) > max_length:
                raise SequenceError(
                    index,
                    f"has {length + len(answer)} tokens ({len(answer)} of them the target), more than "
                    f"`max_length={max_length}`. Shorten it or raise `max_length`.",
                )
        at_last_slice = self.embedding_position == "last_slice"
        slices: list[list[tuple[int, int]]] = [[] for _ in rows]
        if at_last_slice or sentence_ends is not None:
            for index, (ids, length) in enumerate(zip(batch["input_ids"], lengths, strict=True)):
                text, continuation, ends = texts[index], continuations[index], text_ends[index]
                slices[index] = self._slice_spans(
                    index, ids[:length].tolist(), text, continuation, ends, add_special_tokens
                )
        side = padding_side or self.tokenizer.padding_side
        fill = {"input_ids": self.tokenizer.pad_token_id}
        per_token = [name for name, value in batch.items() if _shape(value) == batch["input_ids"].shape]
        for name in per_token:
            rows_of_name = []
            for values, length, answer in zip(batch[name], lengths, answers, strict=True):
                more = {"input_ids": answer, "attention_mask": [1] * len(answer)}.get(name, [0] * len(answer))
                rows_of_name.append(torch.cat([values[:length], torch.tensor(more, dtype=values.dtype)]))
            batch[name] = pad_sequence(rows_of_name, True, fill.get(name, 0), side)

        width = batch["input_ids"].shape[1]
        spans, slice_spans = [], []
        for index, (length, answer, flag) in enumerate(zip(lengths, answers, flags, strict=True)):
            padding = 0 if side == "right" else width - length - len(answer)
            if flag and at_last_slice:
                start, end = [span for span in slices[index] if span[1] <= length][-1]
                spans.append((index, padding + start, padding + end))
            elif flag:
                spans.append((index, padding + length - 1, padding + length))
            if sentence_ends is not None:
                slice_spans += [(index, padding + start, padding + end) for start, end in slices[index]]
        batch["spans"] = torch.tensor(spans, dtype=torch.long).reshape(-1, 3)
        if sentence_ends is not None:
            batch["slice_spans"] = torch.tensor(slice_spans, dtype=torch.long).reshape(-1, 3)
        if any(target is not None for target in targets):
            labels = [
                torch.tensor([-100] * length + answer, dtype=torch.long)
                for length, answer in zip(lengths, answers, strict=True)
            ]
            batch["labels"] = pad_sequence(labels, True, -100, side)
        return batch

    def add_soft_prompts(self) -> dict[str, list[int]]:
        """
        Reserves one token for each token of each hand-written prompt, and uses them instead of it from now on.

        Returns:
            `dict[str, list[int]]`: `soft_prompt_tokens`, as [`UniGDPreTrainedModel.add_soft_prompts`] takes them.

        Raises:
            ValueError: there are soft prompts already.
        """
        if self.soft_prompts is not None:
            raise ValueError("This processor has soft prompts already; a second set would orphan the trained ones.")
        soft_prompts = {
            modality: [f"<|unigd_{modality}_{place}|>" for place in range(len(self._prompt_ids(modality)))]
            for modality in self.prompts
        }
        self.tokenizer.add_tokens([token for tokens in soft_prompts.values() for token in tokens], special_tokens=True)
        self.soft_prompts = soft_prompts
        return self.soft_prompt_tokens

    @property
    def soft_prompt_tokens(self) -> dict[str, list[int]]:
        """For the model's `add_soft_prompts`: ids of the reserved tokens, and of those that they replace."""
        source_ids = [token for modality in self.soft_prompts or {} for token in self._prompt_ids(modality)]
        return {"token_ids": self.soft_prompt_ids, "source_ids": source_ids}

    def _prompt_ids(self, modality: str) -> list[int]:
        return self.tokenizer(self.prompts[modality], add_special_tokens=False)["input_ids"]

    @property
    def soft_prompt_ids(self) -> list[int]:
        """Ids of the reserved tokens of every modality, in the order of `soft_prompts`; empty without soft prompts."""
        tokens = [token for tokens in (self.soft_prompts or {}).values() for token in tokens]
        return self.tokenizer.convert_tokens_to_ids(tokens)

    def _render(self, index, sequence, target, prompted, sentence_ends):
        """The rendered prompt, its images in order, the text that continues it (empty without a target), and where in
        both of them together text slices end."""
        messages, images = self._to_messages(index, sequence, sentence_ends)
        if prompted and self.embedding_position == "prompt":
            modality = "image" if images else "text"
            prompt = "".join(self.soft_prompts[modality]) if self.soft_prompts else self.prompts[modality]
            *earlier, last = messages
            separator = "" if last["content"].endswith(self._image_placeholder) else "\n"
            messages = [*earlier, {**last, "content": last["content"] + separator + prompt}]
        marked = self._apply_template(messages, add_generation_prompt=True)
        continuation, wanted = "", sum(turn["content"].count(_SLICE_END) for turn in messages)
        if target is not None:
            if not target.strip():
                raise SequenceError(index, "has an empty target.")
            answer = _mark_ends(target, sentence_ends)
            wanted += answer.count(_SLICE_END)
            answered = self._apply_template([*messages, {"role": "assistant", "content": answer}])
            if not answered.startswith(marked):
                raise ValueError(
                    "The chat template renders an answered conversation differently from the same conversation with "
                    "`add_generation_prompt=True`, so that no answer can follow the prompt. Use another chat template."
                )
            continuation = answered[len(marked) :].rstrip()
            eos_token = self.tokenizer.eos_token
            continuation = continuation if continuation.endswith(eos_token) else continuation + eos_token
        pieces = (marked + continuation).split(_SLICE_END)
        if len(pieces) != wanted + 1:
            raise SequenceError(
                index, f"has {wanted} texts, but the chat template renders {len(pieces) - 1}. Use another template."
            )
        ends = list(accumulate(len(piece) for piece in pieces[:-1]))
        return marked.replace(_SLICE_END, ""), images, continuation.replace(_SLICE_END, ""), ends

    def _to_messages(self, index, sequence, sentence_ends):
        """Messages with string contents, a placeholder standing where each image was, and the images in order."""
        slices = sequence if isinstance(sequence, (list, tuple)) else [sequence]
        if not slices:
            raise SequenceError(index, "is empty: it needs at least one text or image.")
        if not isinstance(slices[0], dict):
            slices = [{"role": "user", "content": list(slices)}]
        if slices[-1]["role"] != "user":
            raise SequenceError(index, f"ends with the role {slices[-1]['role']!r}; it must end with the user's turn.")
        images: list[Image.Image] = []
        messages = [
            {**turn, "content": self._inline(index, turn["role"], turn["content"], images, sentence_ends)}
            for turn in slices
        ]
        return messages, images

    def _inline(self, index, role, content, images, sentence_ends):
        """One string for a turn, each image replaced by its placeholder. Chat templates put all images first."""
        text, previous = "", None
        for part in [content] if isinstance(content, str) else content:
            if isinstance(part, dict):
                part = part.get("image", part.get("text"))
            if isinstance(part, Image.Image):
                images.append(part)
                # Something must stand between two images, or nothing tells where the first one's tokens end.
                touches = previous == "image" and self._image_placeholder.strip() == self._image_placeholder
                text += ("\n" if previous == "text" or touches else "") + self._image_placeholder
                previous = "image"
            elif isinstance(part, str):
                if not part.strip():
                    raise SequenceError(index, "holds an empty text.")
                for forbidden, name in ((self.vlm_processor.image_token, "image placeholder"), (_SLICE_END, "marker")):
                    if forbidden in part:
                        raise SequenceError(
                            index,
                            f"holds the {name} {forbidden!r} inside a text. Pass images themselves at their places, "
                            "and remove it from the text.",
                        )
                marked = part if role == "system" else _mark_ends(part, sentence_ends)
                text += (" " if previous == "text" else "") + marked
                previous = "text"
            else:
                raise SequenceError(index, f"holds a {type(part).__name__}; a part is a text or a PIL image.")
        if previous is None:
            raise SequenceError(index, "holds an empty turn: it needs at least one text or image.")
        return text

    def _slice_spans(self, index, ids, text, continuation, ends, add_special_tokens):
        """Start and end of every slice of one row, in order, in the tokens of its prompt and continuation.

        `ids` holds the prompt's tokens as the backbone's processor made them, each image's placeholder repeated.
        """
        image_id = self.tokenizer.convert_tokens_to_ids(self.vlm_processor.image_token)
        rendered = self.tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
        is_image = [token == image_id for token in rendered["input_ids"]]
        runs = [len(list(run)) for is_run, run in groupby(ids, lambda token: token == image_id) if is_run]
        lengths = iter(runs)
        repeats = [next(lengths, 0) if image else 1 for image in is_image]
        expanded = [token for token, count in zip(rendered["input_ids"], repeats, strict=True) for _ in range(count)]
        if expanded != ids:
            raise SequenceError(index, "has tokens that cannot be told apart by slice with this backbone's processor.")
        token_ends = list(accumulate(repeats))

        spans = [
            (end - (count if self.image_pooling == "mean" else 1), end)
            for end, count, image in zip(token_ends, repeats, is_image, strict=True)
            if image
        ]
        more_ids, more_offsets = self._continuation(text, continuation)
        offsets = [end for _, end in rendered["offset_mapping"]] + [len(text) + end for end in more_offsets]
        token_ends += [len(ids) + place + 1 for place in range(len(more_ids))]
        for end in ends:
            # The token that holds the slice's last character.
            place = next(place for place, offset in enumerate(offsets) if offset >= end)
            spans.append((token_ends[place] - 1, token_ends[place]))
        return sorted(spans)

    def _apply_template(self, messages, add_generation_prompt=False) -> str:
        messages = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in messages]
        return self.vlm_processor.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)

    @cached_property
    def _image_placeholder(self) -> str:
        """What the chat template renders for an image, found by rendering a turn with and without one."""
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

    def _continuation(self, text: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of `continuation` as it follows `text`, without changing a token of that, and where in it each ends."""
        if not continuation:
            return [], []
        image_token = self.vlm_processor.image_token
        tail = text[text.rfind(image_token) + len(image_token) :] if image_token in text else text
        tokenized = self.tokenizer([tail, tail + continuation], add_special_tokens=False, return_offsets_mapping=True)
        tail_ids, joint_ids = tokenized["input_ids"]
        start, offsets = len(tail), tokenized["offset_mapping"][1]
        if joint_ids[: len(tail_ids)] == tail_ids:
            joint_ids, offsets = joint_ids[len(tail_ids) :], offsets[len(tail_ids) :]
        else:
            # The tokenizer would merge across the border; the prompt has to stay as it is when embedded alone.
            alone = self.tokenizer(continuation, add_special_tokens=False, return_offsets_mapping=True)
            start, joint_ids, offsets = 0, alone["input_ids"], alone["offset_mapping"]
        return joint_ids, [end - start for _, end in offsets]

    @property
    def _settings(self) -> dict:
        return {
            "prompts": self.prompts,
            "soft_prompts": self.soft_prompts,
            "embedding_position": self.embedding_position,
            "image_pooling": self.image_pooling,
        }

    def to_dict(self):
        return {
            "processor_class": type(self).__name__,
            "vlm_processor_class": type(self.vlm_processor).__name__,
            **self._settings,
        }

    def save_pretrained(self, save_directory, push_to_hub=False, **kwargs):
        """Saves the backbone's processor, the prompts and this code in one folder. A probe that is there and was made
        with another processor is removed, with a warning: it would refuse this one."""
        probe_file = Path(save_directory) / PROBE_NAME
        if probe_file.is_file() and processor_differences(self, load_probe(probe_file)):
            logger.warning(
                "Removed %s: it was made with another processor. Save the model to get a new one.", probe_file
            )
            probe_file.unlink()
        files = self.vlm_processor.save_pretrained(save_directory)
        config_file = Path(save_directory) / PROCESSOR_NAME
        config = {**json.loads(config_file.read_text(encoding="utf-8")), **self.to_dict()}
        custom_object_save(self, save_directory, config=config)
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return files

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """
        Loads what [`save_pretrained`] saved, locally or from the Hub.

        Args:
            check_probe (`bool`, *optional*, defaults to `True`): Process the checkpoint's probe and compare.

        Raises:
            ValueError: the folder holds a plain processor; use [`from_vlm_pretrained`]. Or prompts, chat template,
                tokenizer or image processor are no longer those that were saved.
        """
        check_probe = kwargs.pop("check_probe", True)
        config, _ = cls.get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if "vlm_processor_class" not in config:
            raise ValueError(
                f"No processor with embedding prompts is found in {pretrained_model_name_or_path}. "
                f"`{cls.__name__}.from_vlm_pretrained(...)` adds them to it."
            )
        vlm_processor_class = getattr(transformers, config["vlm_processor_class"])
        vlm_processor = vlm_processor_class.from_pretrained(pretrained_model_name_or_path, **kwargs)
        names = ("prompts", "soft_prompts", "embedding_position", "image_pooling")
        processor = cls(vlm_processor, **{name: config[name] for name in names if name in config})
        if check_probe:
            processor._check_probe(pretrained_model_name_or_path, kwargs)
        return processor

    def _check_probe(self, name, kwargs) -> None:
        probe_file = find_file(name, PROBE_NAME, kwargs)
        differences = [] if probe_file is None else processor_differences(self, load_probe(probe_file))
        if differences:
            raise ValueError(
                f"{name} no longer makes the inputs that it made when it was saved: {'; '.join(differences)}. Its "
                "prompts, chat template, tokenizer or image processor have changed. `check_probe=False` loads it all "
                "the same; `hf-unigd doctor` says more."
            )

    @classmethod
    def from_vlm_pretrained(
        cls,
        pretrained_model_name_or_path,
        prompts=None,
        embedding_position="prompt",
        image_pooling="mean",
        **kwargs,
    ):
        """Loads the processor of a plain vision-language model and adds what is embedded of a sequence."""
        vlm_processor = AutoProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return cls(vlm_processor, prompts, embedding_position=embedding_position, image_pooling=image_pooling)


def _mark_ends(text: str, sentence_ends) -> str:
    """`text` with a mark after each sentence; a text is one slice where there is no splitter."""
    ends = [len(text.rstrip())] if sentence_ends is None else sentence_ends(text)
    starts = [0, *ends]
    pieces = [text[start:end] for start, end in zip(starts, [*ends, len(text)], strict=True)]
    return _SLICE_END.join(pieces)


def _shape(value):
    return value.shape if isinstance(value, torch.Tensor) else None


UniGDProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["SequenceError", "UniGDProcessor"]
