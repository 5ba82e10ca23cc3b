"""Tokenizes rendered sequences with a backbone's processor, and finds their images, texts and answers again."""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin

from .rendering_unigd import RenderedSequence, SequenceError


@dataclass(frozen=True)
class TokenizedSequences:
    """
    Attributes:
        batch (`BatchFeature`): The backbone's inputs for the prompts, padded on the right.
        lengths (`list[int]`): Number of tokens of each prompt.
        answers (`list[dict[str, list]]`): For each row, the values of all per-token inputs at the tokens of its
            answer. The lists are empty without an answer.
        labels (`list[torch.LongTensor]`): For each row, the labels of the tokens of its prompt and answer: -100 where
            nothing is learned.
        image_lengths (`list[int]`): Number of tokens of each image, in the order of rows and places.
        slices (`list[list[tuple[int, int]]]`): For each row, start and end (exclusive) of every slice, in order, in
            tokens of its prompt and answer. Empty if the slices are not asked for.
    """

    batch: BatchFeature
    lengths: list[int]
    answers: list[dict[str, list]]
    labels: list[torch.Tensor]
    image_lengths: list[int]
    slices: list[list[tuple[int, int]]]


class SequenceTokenizer:
    """Tokenizes rendered sequences.

    Args:
        vlm_processor (`ProcessorMixin`): The backbone's processor.
        image_pooling (`str`): The slice of an image: `"mean"` for all its tokens, `"last"` for its last token.
    """

    def __init__(self, vlm_processor, image_pooling: str):
        self.vlm_processor = vlm_processor
        self.image_pooling = image_pooling

    def __call__(self, rows: list[RenderedSequence], with_slices: bool) -> TokenizedSequences:
        """
        Args:
            rows (`list[RenderedSequence]`): The rendered sequences.
            with_slices (`bool`): Whether to find the slices. These and the answers of a history need a tokenizer that
                tells which characters a token comes from, as all fast ones do.

        Raises:
            SequenceError: the backbone's processor refuses a sequence, for example an image that is far too long.
        """
        with_offsets = with_slices or any(row.history for row in rows)
        try:
            batch = self._process(rows, with_offsets)
        except Exception:  # an image processor refuses an image in its own way, and does not say which
            for index, row in enumerate(rows):
                try:
                    self._process([row], with_offsets)
                except Exception as error:
                    reason = f"is refused by {type(self.vlm_processor).__name__}: {error}"
                    raise SequenceError(index, reason) from error
            raise
        offsets = batch.pop("offset_mapping", None)
        # What the processor has put in the place of each image, and where.
        replacements = batch.pop("text_replacement_offsets", [[] for _ in rows])
        for name, value in batch.items():
            if _are_rows_of_numbers(value):
                batch[name] = np.array(value)  # of which torch makes a tensor several times faster than of lists
        batch = batch.convert_to_tensors("pt")
        lengths = batch["attention_mask"].sum(1).tolist()
        answers = self._answers(rows, with_offsets)
        labels = []
        for length, answer in zip(lengths, answers, strict=True):
            learned = torch.tensor(answer["input_ids"], dtype=torch.long)
            labels.append(torch.cat([torch.full((length,), -100), learned]))
        slices: list[list[tuple[int, int]]] = [[] for _ in rows]
        for index, length in enumerate(lengths if with_offsets else []):
            ids = batch["input_ids"][index, :length].tolist()
            given = rows[index], offsets[index][:length], replacements[index]
            self._label_history(*given, ids, labels[index])
            if with_slices:
                texts = self._text_slices(*given, answers[index])
                slices[index] = sorted([*self._image_slices(ids, offsets[index], replacements[index]), *texts])
        image_lengths = [
            self._count_patches(replacement["replacement"]) for row in replacements for replacement in row
        ]
        return TokenizedSequences(batch, lengths, answers, labels, image_lengths, slices)

    def _process(self, rows: list[RenderedSequence], with_offsets: bool) -> BatchFeature:
        bos_token = self.vlm_processor.tokenizer.bos_token
        images = [row.images for row in rows]
        return self.vlm_processor(
            text=[row.prompt for row in rows],
            images=images if any(images) else None,
            return_text_replacement_offsets=True,
            images_kwargs={"return_tensors": "pt"},
            text_kwargs={
                "add_special_tokens": not (bos_token and rows[0].prompt.startswith(bos_token)),
                "padding": True,
                "padding_side": "right",
                "return_offsets_mapping": with_offsets,
                "return_tensors": None,  # some processors would make a tensor of the replacements too
            },
        )

    @lru_cache(maxsize=4096)  # noqa: B019  # it lives as long as the process
    def count_image_tokens(self, size: tuple[int, int]) -> int:
        """The number of tokens of an image of this height and width, found by processing one."""
        return self._count_patches(self._expand(Image.new("RGB", size[::-1])))

    @cached_property
    def patch_id(self) -> int:
        """The token that stands for a part of an image: the one that the backbone's processor repeats longest. It is
        not always the image token of the text, and others mark the beginnings of images, rows and tiles."""
        tokenizer = self.vlm_processor.tokenizer
        ids = tokenizer(self._expand(Image.new("RGB", (512, 512))), add_special_tokens=False)["input_ids"]
        return max((len(list(run)), token) for token, run in groupby(ids))[1]

    def _count_patches(self, text: str) -> int:
        return text.count(self.vlm_processor.tokenizer.convert_ids_to_tokens(self.patch_id))

    def _expand(self, image: Image.Image) -> str:
        """What the backbone's processor puts in the place of an image."""
        inputs = self.vlm_processor(
            text=[self.vlm_processor.image_token],
            images=[[image]],
            return_text_replacement_offsets=True,
            images_kwargs={"return_tensors": "pt"},
            text_kwargs={"return_tensors": None},
        )
        return inputs["text_replacement_offsets"][0][0]["replacement"]

    def _image_slices(self, ids, offsets, replacements) -> list[tuple[int, int]]:
        """Start and end of every image: from its first to its last patch, or its last patch alone."""
        slices = []
        for first, last in (replacement["new_span"] for replacement in replacements):
            patches = [
                place
                for place, token in enumerate(ids)
                if token == self.patch_id and first <= offsets[place][0] < offsets[place][1] <= last
            ]
            slices.append((patches[0] if self.image_pooling == "mean" else patches[-1], patches[-1] + 1))
        return slices

    def _text_slices(self, row: RenderedSequence, offsets, replacements, answer) -> list[tuple[int, int]]:
        """Start and end of the token that holds the last character of every text slice."""
        length = _expanded(len(row.prompt), replacements)
        offsets = [*offsets, *((length + first, length + last) for first, last in answer["offset_mapping"])]
        tokens = [(first, place) for place, (first, last) in enumerate(offsets) if first < last]
        slices = []
        for end in row.slice_ends:
            _, place = tokens[bisect_left(tokens, (_expanded(end, replacements), -1)) - 1]
            slices.append((place, place + 1))
        return slices

    def _label_history(self, row: RenderedSequence, offsets, replacements, ids, labels) -> None:
        """Labels every token that holds a character of an earlier answer. What the template does not render of the end
        of an answer is the label of the token that follows, so that the model learns to end each of them alike."""
        tokens = [(*span, place) for place, span in enumerate(offsets) if span[0] < span[1]]
        firsts, lasts = [first for first, _, _ in tokens], [last for _, last, _ in tokens]
        for each in row.history:
            start, end = (_expanded(place, replacements) for place in (each.start, each.end))
            answer = tokens[bisect_right(lasts, start) : bisect_left(firsts, end)]
            first, after = answer[0][2], answer[-1][2] + 1
            labels[first:after] = torch.tensor(ids[first:after])
            if each.unrendered:
                unrendered = self.vlm_processor.tokenizer(each.unrendered, add_special_tokens=False)
                labels[after] = unrendered["input_ids"][0]

    def _answers(self, rows: list[RenderedSequence], with_offsets: bool) -> list[dict[str, list]]:
        """For each row, the values of all per-token inputs at the tokens of its answer, as the backbone's processor
        continues those of the prompt, and with `with_offsets` where the tokens start and end, in characters of the
        answer."""
        # The text after the last image is enough, and free of image tokens, which the processor would expand.
        tails = [row.prompt.rpartition(self.vlm_processor.image_token)[2] for row in rows]
        answered = [(tail, tail + row.answer) for row, tail in zip(rows, tails, strict=True) if row.answer]
        tokenized = self._tokenize([text for pair in answered for text in pair], with_offsets)
        return [
            self._answer(row, tail, tokenized, with_offsets) if row.answer else defaultdict(list)
            for row, tail in zip(rows, tails, strict=True)
        ]

    def _answer(self, row: RenderedSequence, tail: str, tokenized, with_offsets: bool) -> dict[str, list]:
        prompt, joint = tokenized[tail]["input_ids"], tokenized[tail + row.answer]
        start = len(prompt)
        if joint["input_ids"][:start] != prompt:
            # The tokenizer would merge the end of the prompt with the answer, and change the tokens of the prompt.
            return self._tokenize([row.answer], with_offsets)[row.answer]
        answer = {name: values[start:] for name, values in joint.items()}
        if with_offsets:
            answer["offset_mapping"] = [
                (first - len(tail), last - len(tail)) for first, last in answer["offset_mapping"]
            ]
        return answer

    def _tokenize(self, texts: list[str], with_offsets: bool) -> dict[str, dict[str, list]]:
        """The per-token inputs that the backbone's processor makes of texts without images, by text."""
        texts = list(dict.fromkeys(texts))
        if not texts:
            return {}
        inputs = self.vlm_processor(
            text=texts,
            text_kwargs={
                "add_special_tokens": False,
                "padding": False,
                "return_offsets_mapping": with_offsets,
                "return_tensors": None,
            },
        )
        return {text: {name: values[place] for name, values in inputs.items()} for place, text in enumerate(texts)}


def _are_rows_of_numbers(value) -> bool:
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, list) and bool(first) and isinstance(first[0], int)


def _expanded(place: int, replacements) -> int:
    """A place in a prompt, in characters of the prompt whose images are expanded."""
    # By how much the prompt has grown at the end of each image.
    grown = ((each["span"][1], each["new_span"][1] - each["span"][1]) for each in reversed(replacements))
    return place + next((growth for end, growth in grown if end <= place), 0)


def check_vlm_processor(vlm_processor) -> None:
    """
    Raises:
        ValueError: the backbone's processor lacks something that sequences need.
    """
    name = type(vlm_processor).__name__
    if (
        getattr(vlm_processor, "image_token", None) is None
        or type(vlm_processor).replace_image_token is ProcessorMixin.replace_image_token
    ):
        raise ValueError(
            f"{name} is not supported: it does not say by which tokens it replaces an image (it has no `image_token` "
            "or no `replace_image_token`)."
        )
    try:
        vlm_processor(text=["a"])
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{name} is not supported: it processes no text without an image ({error}), so texts cannot be embedded."
        ) from error
