"""Questions about drawn icons, to be learned and to be counted, with and without what an index holds."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from PIL import Image

from ..data.icons import COLOURS, SIZES, draw_icon, glyph_mask, long_caption, short_caption
from ..modeling import UniGDForConditionalGeneration, UniGDProcessor
from ..retrieval import answer_with_retrieval, build_index
from ..retrieval.answering import make_prompt
from ..retrieval.entries import Hit


KINDS = ("what it is", "its colour", "its size", "whether there is")
WAYS = ("alone", "with retrieval")
K = 3  # entries in a prompt, as `hf-unigd answer` puts there
CHOICE = 6  # of so many nearest icons, K are shown
LOOKED_AT = 24  # pixels
LONGEST = 12  # tokens of an answer


def ask(kind: str, icon: str, colour: str, size: str, words: Sequence[str], draw: random.Random) -> tuple[str, str]:
    """A question of a kind about an icon, and its answer. `words` are those of all icons, as often as they occur."""
    if kind == "what it is":
        return "What is it?", short_caption(icon)
    if kind == "its colour":
        return "Which colour is it?", colour
    if kind == "its size":
        return "How large is it?", size
    own = icon.split("_")
    if draw.random() < 0.5:
        return f"Is there {draw.choice(own)}?", "yes"
    word = draw.choice(words)
    return f"Is there {word}?", "yes" if word in own else "no"


class Neighbours:
    """
    The icons that look most like another one, as an index finds them for a picture: many of them have a name without
    any word in common.

    Args:
        glyphs: The font characters of icons, by name.
    """

    def __init__(self, glyphs: Mapping[str, str]):
        self.names = list(glyphs)
        masks = [
            np.asarray(glyph_mask(glyph, round(LOOKED_AT * SIZES["large"]), LOOKED_AT)) for glyph in glyphs.values()
        ]
        pixels = F.normalize(torch.tensor(np.stack(masks), dtype=torch.float32).flatten(1))
        self._nearest: dict[str, list[int]] = {}
        for start in range(0, len(pixels), 1000):
            similarities = pixels[start : start + 1000] @ pixels.T
            places = range(start, start + len(similarities))
            similarities[range(len(similarities)), places] = -torch.inf  # an icon is not its own neighbour
            found = similarities.topk(min(CHOICE, len(pixels) - 1)).indices.tolist()
            self._nearest.update(zip((self.names[place] for place in places), found, strict=True))

    def of(self, icon: str, count: int, draw: random.Random) -> list[str]:
        """The names of `count` icons of those that look most like an icon, best first."""
        nearest = self._nearest[icon]
        return [self.names[nearest[rank]] for rank in sorted(draw.sample(range(len(nearest)), count))]


def question_rows(icons: Dataset, seed: int) -> Dataset:
    """
    Rows to learn answers from.

    Args:
        icons: Rows of [`load_icons`].
        seed: Draws the questions, and what stands before them.

    Returns:
        For each icon a chat of four questions, in the column `messages`. In every other one the first question stands
        behind three entries, in the prompt of [`answer_with_retrieval`].
    """
    stored = icons.with_format(None)
    words = [word for name in stored["icon"] for word in name.split("_")]
    neighbours = Neighbours(dict(zip(stored["icon"], stored["glyph"], strict=True)))
    numbered = stored.add_column("number", list(range(len(stored))))
    return numbered.with_transform(partial(_make_chats, words=words, neighbours=neighbours, seed=seed))


def search_rows(icons: Dataset, seed: int) -> Dataset:
    """
    Rows to learn to search from, for an answer is looked up by its picture and its question together.

    Args:
        icons: Rows of [`load_icons`].
        seed: Draws the questions.

    Returns:
        For each icon its picture with a question, in the column `anchor`, and its name, in the column `positive`.
    """
    stored = icons.with_format(None)
    words = [word for name in stored["icon"] for word in name.split("_")]
    numbered = stored.add_column("number", list(range(len(stored))))
    return numbered.with_transform(partial(_make_searches, words=words, seed=seed))


def _make_searches(rows: dict[str, list], words: Sequence[str], seed: int) -> dict[str, list]:
    anchors = []
    for icon, glyph, attributes, number in zip(
        rows["icon"], rows["glyph"], rows["attributes"], rows["number"], strict=True
    ):
        draw = random.Random(f"{seed}-{number}")
        colour, size = attributes["colour"], attributes["size"]
        question, _ = ask(draw.choice(KINDS), icon, colour, size, words, draw)
        anchors.append([draw_icon(glyph, colour, size, attributes["side"]), question])
    return {"anchor": anchors, "positive": [short_caption(icon) for icon in rows["icon"]]}


def _make_chats(rows: dict[str, list], words: Sequence[str], neighbours: Neighbours, seed: int) -> dict[str, list]:
    chats = []
    for icon, glyph, attributes, number in zip(
        rows["icon"], rows["glyph"], rows["attributes"], rows["number"], strict=True
    ):
        draw = random.Random(f"{seed}-{number}")
        colour, size = attributes["colour"], attributes["size"]
        behind_entries = number % 2 == 0
        messages: list[dict[str, Any]] = []
        for kind in draw.sample(KINDS, len(KINDS)):
            question, answer = ask(kind, icon, colour, size, words, draw)
            asked: list[str | Image.Image] = [question]
            if not messages:
                asked.insert(0, draw_icon(glyph, colour, size, attributes["side"]))
            if behind_entries:
                asked = make_prompt(asked, [_entry(name, draw) for name in neighbours.of(icon, K, draw)])
            messages.append({"role": "user", "content": [_part(each) for each in asked]})
            messages.append({"role": "assistant", "content": answer})
        chats.append(messages)
    return {"messages": chats}


def _entry(icon: str, draw: random.Random) -> Hit:
    """What an index of icons holds of one in any colour and size."""
    caption = long_caption(icon, draw.choice(list(COLOURS)), draw.choice(list(SIZES)))
    return Hit(0.0, icon, 0, [], [short_caption(icon), caption])


def _part(part: str | Image.Image) -> dict[str, Any]:
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}


@dataclass
class Question:
    """
    Attributes:
        icon: Name of the icon that it is about.
        kind: One of `KINDS`.
        text: The question.
        answer: The right answer.
        said: What the model says, by way: one of `WAYS`.
    """

    icon: str
    kind: str
    text: str
    answer: str
    said: dict[str, str] = field(default_factory=dict)

    def is_right(self, way: str) -> bool:
        """Whether the first word of an answer is right."""
        return self.said[way].split()[:1] == self.answer.split()[:1]


@torch.no_grad()
def answer_questions(
    model: UniGDForConditionalGeneration,
    processor: UniGDProcessor,
    known: Dataset,
    icons: Dataset,
    batch_size: int = 100,
) -> list[Question]:
    """
    Asks each kind of question about each icon, without retrieval, and with an index of other icons.

    Args:
        model: Answers, and makes the index.
        processor: Its processor.
        known: Rows of [`load_icons`] to index.
        icons: Rows to ask about.
        batch_size: Questions per forward pass.

    Returns:
        The questions, answered in both ways.
    """
    draw = random.Random(0)
    stored = icons.with_format(None)
    words = [word for name in stored["icon"] for word in name.split("_")]
    questions: list[Question] = []
    sequences: list[Any] = []
    for row, attributes in zip(icons, stored["attributes"], strict=True):
        for kind in KINDS:
            text, answer = ask(kind, row["icon"], attributes["colour"], attributes["size"], words, draw)
            questions.append(Question(row["icon"], kind, text, answer))
            sequences.append([row["image"], text])
    with TemporaryDirectory() as folder:
        index = build_index(model, processor, known, folder, batch_size=batch_size, show_progress=False)
        for start in range(0, len(questions), batch_size):
            batch, asked = sequences[start : start + batch_size], questions[start : start + batch_size]
            inputs = processor.process_sequences(batch, prompted=False, padding_side="left").to(model.device)
            generated = model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)
            alone = processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            found = answer_with_retrieval(model, processor, index, batch, K, max_new_tokens=LONGEST, do_sample=False)
            for question, said, hits in zip(asked, alone, found, strict=True):
                question.said = {"alone": said.strip(), "with retrieval": hits.text}
    return questions


def answer_accuracy(questions: Sequence[Question]) -> dict[str, float]:
    """The share of right answers of each kind and of all, alone and with retrieval."""
    return {
        _metric(kind, way): fmean(each.is_right(way) for each in questions if kind in ("all", each.kind))
        for way in WAYS
        for kind in (*KINDS, "all")
    }


def show_answers(questions: Sequence[Question], accuracy: dict[str, float], count: int = 3) -> None:
    """Prints how many answers are right, and some of them."""
    icons = len(questions) // len(KINDS)
    print(f"\n{f'answers about {icons} of these icons':<28}{WAYS[0]:>10}{WAYS[1]:>16}")
    for kind in (*KINDS, "all"):
        alone, retrieved = (accuracy[_metric(kind, way)] for way in WAYS)
        print(f"{kind:<28}{alone:>10.1%}{retrieved:>16.1%}")
    for place in range(count):  # of icons at equal distances, another kind of each
        each = questions[place * icons // count * len(KINDS) + place % len(KINDS)]
        print(f"  {short_caption(each.icon)}: {each.text}\n    -> {each.said['with retrieval']}")


def _metric(kind: str, way: str) -> str:
    return f"answers_{kind}_{way}".replace(" ", "_")
