"""Questions about drawn icons, to be learned and to be counted, with and without what an index holds."""

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from PIL import Image

from ..data.icons import COLOURS, SIZES, draw_icon, long_caption, short_caption
from ..modeling import UniGDForConditionalGeneration, UniGDProcessor
from ..retrieval import answer_with_retrieval, build_index
from ..retrieval.answering import make_prompt
from ..retrieval.entries import Hit


KINDS = ("what it is", "its colour", "its size", "whether there is")
WAYS = ("alone", "with retrieval")
K = 3  # entries in a prompt, as `hf-unigd answer` puts there
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
    """Names of icons by the words that they share, as an index would find them."""

    def __init__(self, names: Sequence[str]):
        self.names = list(names)

    @cached_property
    def _by_word(self) -> dict[str, list[str]]:
        by_word: dict[str, list[str]] = defaultdict(list)
        for name in self.names:
            for word in name.split("_"):
                by_word[word].append(name)
        return by_word

    def of(self, icon: str, count: int, draw: random.Random) -> list[str]:
        """The names that share most words with that of an icon, but not its own. Among equals, `draw` chooses."""
        shared = Counter(name for word in set(icon.split("_")) for name in self._by_word[word] if name != icon)
        names = sorted(shared, key=lambda name: (-shared[name], draw.random()))[:count]
        while len(names) < count:
            name = draw.choice(self.names)
            if name != icon and name not in names:
                names.append(name)
        return names


def question_rows(icons: Dataset, seed: int) -> Dataset:
    """
    Rows to learn answers from.

    Args:
        icons: Rows of [`load_icons`].
        seed: Draws the questions, and what stands before them.

    Returns:
        For each icon a chat, in the column `messages`: every other one of four questions, and the others of one
        question behind three entries, in the prompt of [`answer_with_retrieval`].
    """
    stored = icons.with_format(None)
    words = [word for name in stored["icon"] for word in name.split("_")]
    neighbours = Neighbours(sorted(set(stored["icon"])))
    numbered = stored.add_column("number", list(range(len(stored))))
    return numbered.with_transform(partial(_make_chats, words=words, neighbours=neighbours, seed=seed))


def search_rows(icons: Dataset, seed: int) -> Dataset:
    """
    Rows to learn to search from: an answer is looked up by a picture and a question together, which are like nothing
    that captions teach.

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
        kinds = draw.sample(KINDS, 1 if behind_entries else len(KINDS))
        messages: list[dict[str, Any]] = []
        for kind in kinds:
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
