"""Our models, and plain vision-language models, as lmms-eval runs them: `lmms-eval --model unigd`.

lmms-eval imports this file in an environment of its own (`make lmms-eval`); nothing else does.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from lmms_eval.api.model import lmms
from tqdm.auto import tqdm

from ..data.images import open_image
from .embedders import ModelEmbedder, load_embedder


_MAX_NEW_TOKENS = 1024
_IGNORED = -100


class UniGDLmms(lmms):
    """
    A model of lmms-eval that generates as `hf-unigd generate` does.

    Args:
        pretrained: Hub id or folder of a checkpoint, an adapter, or a plain vision-language model.
        batch_size: Questions per forward pass.
        dtype: Name of the type to load it in, or `"auto"`.
        device: Not used: accelerate says which device a process has.

    Raises:
        ValueError: the model does not generate.
    """

    is_simple = False

    def __init__(
        self, pretrained: str, batch_size: int | str = 1, dtype: str = "auto", device: str | None = None
    ) -> None:
        super().__init__()
        self.batch_size = int(batch_size)
        embedder = load_embedder(pretrained, batch_size=self.batch_size, dtype=dtype)
        if not isinstance(embedder, ModelEmbedder):
            raise ValueError(f"{pretrained} does not generate.")
        self.model, self.processor = embedder.model, embedder.processor
        self.device = self.model.device

    @property
    def tokenizer(self):
        return self.processor.tokenizer

    def generate_until(self, requests) -> list[str]:
        """Answers questions in batches of the same settings. Each request has a function that makes the messages of a
        row."""
        answers: dict[int, str] = {}
        chats = [self._chat(request) for request in requests]
        settings = [request.args[2] for request in requests]
        for places in _batches([repr(sorted(each.items())) for each in settings], self.batch_size):
            said = self._answer([chats[place] for place in places], settings[places[0]])
            answers |= dict(zip(places, said, strict=True))
        return [answers[place] for place in range(len(requests))]

    def generate_until_multi_round(self, requests) -> list[list[str]]:
        """Answers the questions of several rounds, of which each may depend on the answers before."""
        found = []
        for request in tqdm(requests, desc="Answering", unit="row", disable=self.rank != 0):
            _, make_messages, settings, number, task, split = request.args
            row, more, messages = self.task_dict[task][split][number], None, None
            said: list[str] = []
            while True:
                if not said:
                    messages = make_messages(row)
                else:
                    made = make_messages(
                        row, round_idx=len(said), previous_output=list(said), previous_round_info=more
                    )
                    if not (isinstance(made, tuple) and len(made) == 4):
                        break
                    messages, is_last, _, more = made
                    if is_last:
                        break
                said += self._answer([_as_chat(messages)], settings)
            found.append(said)
        return found

    @torch.no_grad()
    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation in nats, without the token that ends it, and whether greedy decoding
        would give it. Images stand before the context."""
        found: list[tuple[float, bool]] = []
        for start in tqdm(
            range(0, len(requests), self.batch_size), desc="Scoring", unit="batch", disable=self.rank != 0
        ):
            sequences, targets = [], []
            for request in requests[start : start + self.batch_size]:
                context, target, images_of, number, task, split = request.args
                row = self.task_dict[task][split][number]
                images = [open_image(image) for image in images_of(row) or []]
                sequences.append([*images, *([context] if context.strip() else [])])
                targets.append((target(row) if callable(target) else target).strip())
            batch = self.processor.process_sequences(
                sequences, targets, prompted=False, max_length=self.model.config.context_length
            ).to(self.model.device, self.model.dtype)
            found += self._scores(batch)
        return found

    def _scores(self, batch: Mapping[str, torch.Tensor]) -> Iterator[tuple[float, bool]]:
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "spans")}
        states = self.model._decode(use_cache=False, **inputs).last_hidden_state[:, :-1]
        for own, labels in zip(states, batch["labels"][:, 1:], strict=True):
            labelled = (labels != _IGNORED) & (labels != self.tokenizer.eos_token_id)
            logits = self.model.logits(own[labelled]).reshape(int(labelled.sum()), -1).float()
            picked = logits.log_softmax(-1).gather(1, labels[labelled][:, None])
            yield picked.sum().item(), bool((logits.argmax(-1) == labels[labelled]).all())

    def _chat(self, request) -> list[dict[str, Any]]:
        _, make_messages, _, number, task, split = request.args
        return _as_chat(make_messages(self.task_dict[task][split][number]))

    def _answer(self, chats: list[list[dict[str, Any]]], settings: Mapping[str, Any]) -> list[str]:
        batch = self.processor.process_sequences(
            chats, prompted=False, padding_side="left", max_length=self.model.config.context_length
        ).to(self.model.device, self.model.dtype)
        generated = self.model.generate(**batch, **_generation(settings))
        texts = self.processor.batch_decode(generated[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return [_until(text, settings.get("until")) for text in texts]


def _as_chat(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages of lmms-eval as our processor takes them."""
    return [{"role": message["role"], "content": [_part(part) for part in message["content"]]} for message in messages]


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    if part["type"] == "image":
        return {"type": "image", "image": open_image(part["url"])}
    raise ValueError(f"A question holds a part of type {part['type']!r}; only texts and images are supported.")


def _generation(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of lmms-eval as arguments of `generate`. A temperature of 0 is greedy."""
    sampled = {name: settings[name] for name in ("temperature", "top_p") if settings.get(name)}
    is_sampled = bool(settings.get("temperature"))
    return {
        "max_new_tokens": settings.get("max_new_tokens", _MAX_NEW_TOKENS),
        "num_beams": settings.get("num_beams", 1),
        "do_sample": is_sampled,
        **(sampled if is_sampled else {}),
    }


def _until(text: str, stops: str | Sequence[str] | None) -> str:
    """A text up to the first of some stops."""
    for stop in [stops] if isinstance(stops, str) else stops or []:
        text = text.split(stop)[0] if stop else text
    return text.strip()


def _batches(keys: Sequence[str], size: int) -> Iterator[list[int]]:
    """Places of equal keys, at most `size` together."""
    order = sorted(range(len(keys)), key=lambda place: keys[place])
    for _, group in groupby(order, key=lambda place: keys[place]):
        places = list(group)
        for start in range(0, len(places), size):
            yield places[start : start + size]
