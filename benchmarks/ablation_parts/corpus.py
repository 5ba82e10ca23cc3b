"""What the base model learns to say: answers about drawn pictures and about texts, each after a question."""

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk
from torch.utils import data

from hf_unigd.data import DatasetMixture, DatasetSource, load_icons, load_scenes


SIDE = 64
# Questions by what they ask for. A picture and a text are asked the same.
QUESTIONS = {
    "description": ("Describe it.", "What is shown?"),
    "caption": ("Write a caption.", "Say it shortly."),
    "word": ("In one word", "Name it in one word."),
}
# Of the batches. Each holds questions of one kind about one kind of rows, so that little is padded.
SHARES = {
    "scenes": {"description": 0.2, "caption": 0.22, "word": 0.04},
    "icons": {"description": 0.08, "caption": 0.03, "word": 0.02},
    "clip art": {"description": 0.05, "caption": 0.01, "word": 0.01},
    "texts": {"description": 0.04, "caption": 0.05, "word": 0.03},
    "questions": {"answer": 0.22},
}
SCENES, VALIDATION, ICON_VIEWS = 16_000, 500, 4
CLIP_ART = Path("runs/openclipart/rows")
# A caption that begins with the name of what is shown is learned faster.
ICON_OPENING = "An icon of "

Answers = Callable[[dict[str, Any], random.Random], dict[str, str]]


class Conversations(data.Dataset):
    """
    A question and its answer about each row, drawn by the number of the row.

    Args:
        rows: Rows with `image`, and what `answers` reads.
        answers: Gives the answers to each kind of question about a row, and for texts what it is about, by `"text"`.
        kind: The kind of questions.
    """

    def __init__(self, rows: Any, answers: Answers, kind: str):
        self.rows, self.answers, self.kind = rows, answers, kind

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        row = self.rows[place]
        draw = random.Random(place)
        answers = self.answers(row, draw)
        question = draw.choice(QUESTIONS[self.kind])
        asked = f"{answers['text']}\n{question}" if "text" in answers else f"<image>{question}"
        return chat(asked, answers[self.kind], row)


def chat(question: str, answer: str, row: dict[str, Any]) -> dict[str, Any]:
    """A row with one question, whose image tag stands for the picture of `row`."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **({"images": [row["image"]]} if "<image>" in question else {})}


def scene_answers(row: dict[str, Any], draw: random.Random) -> dict[str, str]:
    word = draw.choice(row["icons"])["shape"]
    return {"description": row["long_caption"], "caption": row["short_caption"], "word": word}


def text_answers(row: dict[str, Any], draw: random.Random) -> dict[str, str]:
    """A text is the short caption of a scene."""
    return {"text": row["short_caption"], **scene_answers(row, draw)}


def icon_answers(row: dict[str, Any], draw: random.Random) -> dict[str, str]:
    names = row["icon"].split("_")
    return {
        "description": row["long_caption"].removeprefix(ICON_OPENING),
        "caption": row["short_caption"],
        "word": draw.choice(names),
    }


def clip_art_answers(row: dict[str, Any], draw: random.Random) -> dict[str, str]:
    return {
        "description": row["long_caption"],
        "caption": row["short_caption"],
        "word": draw.choice(row["short_caption"].split()),
    }


def scenes(split: str) -> Dataset:
    """Scenes to train on (`"train"`), to choose settings by (`"validation"`), or of held-out combinations
    (`"test"`)."""
    if split == "test":
        return load_scenes("test", size=SIDE)
    rows = load_scenes("train", count=SCENES + VALIDATION, size=SIDE).remove_columns("negatives")
    return rows.select(range(SCENES) if split == "train" else range(SCENES, SCENES + VALIDATION))


def questions(split: str) -> Dataset:
    """Chats of four questions about a scene each."""
    return load_scenes(split, "chats", count=SCENES if split == "train" else None, size=SIDE)


def clip_art(split: str, folder: Path = CLIP_ART) -> Dataset:
    """
    Rows of OpenClipart.

    Raises:
        FileNotFoundError: `benchmarks/openclipart.py` has not written them.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist. How to make it: python benchmarks/openclipart.py --help")
    rows = load_from_disk(str(folder))
    return rows.select([place for place, each in enumerate(rows["split"]) if each == split])


def icons(split: str) -> Dataset:
    return load_icons(split, views=ICON_VIEWS if split == "train" else 1, size=SIDE)


def pretraining_rows() -> DatasetMixture:
    """All that the base model is trained on."""
    drawn = {
        "scenes": (scenes("train"), scene_answers),
        "icons": (icons("train"), icon_answers),
        "clip art": (clip_art("train"), clip_art_answers),
        "texts": (WithoutImages(scenes("train")), text_answers),
    }
    sources = [
        DatasetSource(Conversations(*drawn[name], kind), f"{name}, {kind}", share)
        for name, shares in SHARES.items()
        if name in drawn
        for kind, share in shares.items()
    ]
    return DatasetMixture([*sources, DatasetSource(questions("train"), "questions", SHARES["questions"]["answer"])])


class WithoutImages(Sequence):
    """Rows as they are stored, before their images are drawn."""

    def __init__(self, rows: Dataset):
        self.rows = rows.with_format(None)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place):
        return self.rows[place]


def texts() -> Iterator[str]:
    """All that the tokenizer of the base model is trained on."""
    for row in WithoutImages(scenes("train")):
        yield from (row["short_caption"], row["long_caption"])
    for row in WithoutImages(questions("train")):
        yield from (turn["content"] for turn in row["messages"])
    for row in icons("train").select_columns(["icon", "attributes", "glyph"]):
        yield from (row["short_caption"], row["long_caption"].removeprefix(ICON_OPENING))
    for row in clip_art("train").select_columns(["short_caption", "long_caption"]):
        yield from (row["short_caption"], row["long_caption"])
    for question in chain.from_iterable(QUESTIONS.values()):
        yield from [f"USER: \n{question} ASSISTANT:"] * 500
