"""What the base model learns to say: answers about drawn pictures and about texts, each after a question."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from datasets import Dataset, load_from_disk
from torch.utils import data

from hf_unigd.data import DatasetMixture, DatasetSource, load_icons, load_scenes
from hf_unigd.data.icons import COLOURS, SIZES
from hf_unigd.data.scene_pictures import Thing, draw_picture


SIDE = 64
# Questions by what they ask for. A picture and a text are asked the same.
QUESTIONS = {
    "description": ("Describe it.", "What is shown?"),
    "caption": ("Write a caption.", "Say it shortly."),
    "word": ("In one word", "Name it in one word."),
}
SCENES, VALIDATION, ICON_VIEWS = 16_000, 500, 4
COMBINED = 3360  # scenes of held-out combinations, all that there are
FACTS = 3  # questions of a chat
CLIP_ART = Path("runs/openclipart/rows")

# The shares of rows in the three stages of pretraining. In the first one most pictures show one thing: of two things a
# model learns the colours, and guesses the shapes. All answers are short until the last stage: a model that begins
# with long ones learns their wording, and does not look at the picture.
SINGLE_THINGS = {
    ("things", "facts"): 0.5,
    ("things", "caption"): 0.3,
    ("icons", "facts"): 0.12,
    ("texts", "word"): 0.04,
    ("clip art", "word"): 0.04,
}
SHORT_ANSWERS = {
    ("things", "facts"): 0.1,
    ("scenes", "facts"): 0.35,
    ("scenes", "caption"): 0.25,
    ("scenes", "word"): 0.03,
    ("icons", "facts"): 0.12,
    ("texts", "caption"): 0.08,
    ("texts", "word"): 0.04,
    ("clip art", "word"): 0.03,
}
ALL_ANSWERS = {
    ("scenes", "description"): 0.25,
    ("scenes", "caption"): 0.15,
    ("scenes", "facts"): 0.1,
    ("scenes", "word"): 0.03,
    ("icons", "description"): 0.09,
    ("icons", "caption"): 0.02,
    ("clip art", "description"): 0.05,
    ("clip art", "word"): 0.02,
    ("texts", "description"): 0.05,
    ("texts", "caption"): 0.04,
    ("texts", "word"): 0.03,
    ("questions", ""): 0.17,
}

# Of a model that is taught to see, and not to speak.
ENGLISH_ANSWERS = {
    ("things", "caption"): 0.3,
    ("scenes", "caption"): 0.4,
    ("icons", "caption"): 0.2,
    ("clip art", "word"): 0.1,
}

Row = dict[str, Any]
Turns = list[tuple[str, str]]


class Conversations(data.Dataset):
    """
    A chat about each row, drawn by the number of the row.

    Args:
        rows: Rows with `image`, and what `turns` reads.
        turns: Gives the questions about a row, with their answers.
        about_text: Whether the short caption of a row stands for its picture.
    """

    def __init__(self, rows: Any, turns: Callable[[Row, random.Random], Turns], about_text: bool = False):
        self.rows, self.turns, self.about_text = rows, turns, about_text

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Row:
        row = self.rows[place]
        return chat(row, self.turns(row, random.Random(place)), self.about_text)


class Columns(data.Dataset):
    """
    Some columns of rows.

    Args:
        rows: The rows.
        columns: The columns, by the names that they get.
    """

    def __init__(self, rows: Any, columns: Mapping[str, str]):
        self.rows, self.columns = rows, columns

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Row:
        row = self.rows[place]
        return {own: row[name] for own, name in self.columns.items()}


class SingleThings(data.Dataset):
    """
    Both things of each scene, each in a picture of its own, where it stands in the scene.

    Args:
        rows: Scenes. Their pictures are not needed.
    """

    def __init__(self, rows: Any):
        self.rows = rows

    def __len__(self) -> int:
        return 2 * len(self.rows)

    def __getitem__(self, place: int) -> Row:
        scene, number = divmod(place, 2)
        icons = list(things_of(self.rows[scene]).values())[number]
        said = Thing(icons[0]["shape"], icons[0]["colour"], icons[0]["size"], len(icons))
        return {"image": draw_picture(icons, SIDE), "icons": icons, "short_caption": str(said)}


def things_of(row: Row) -> dict[str, list[Row]]:
    """The icons of each thing of a scene, by its shape."""
    things: dict[str, list[Row]] = {}
    for icon in row["icons"]:
        things.setdefault(icon["shape"], []).append(icon)
    return things


def chat(row: Row, turns: Turns, about_text: bool = False) -> Row:
    """A row with questions about the picture of `row`, or about its short caption, and their answers."""
    opening = f"{row['short_caption']}\n" if about_text else "<image>"
    messages = []
    for question, answer in turns:
        messages += [
            {"role": "user", "content": f"{'' if messages else opening}{question}"},
            {"role": "assistant", "content": answer},
        ]
    return {"messages": messages} if about_text else {"messages": messages, "images": [row["image"]]}


def describe(row: Row, draw: random.Random) -> Turns:
    return [(draw.choice(QUESTIONS["description"]), row["long_caption"])]


def describe_icon(row: Row, draw: random.Random) -> Turns:
    return [(draw.choice(QUESTIONS["description"]), icon_description(row))]


def icon_description(row: Row) -> str:
    """A caption that begins with the name of what is shown, as such captions are learned faster."""
    colour, size = icon_attributes(row)
    return f"{row['short_caption']}, a {size} {colour} icon."


def icon_attributes(row: Row) -> tuple[str, str]:
    """The colour and the size of an icon, which its long caption says at its end."""
    words = row["long_caption"].rstrip(".").split()[::-1]
    return next(word for word in words if word in COLOURS), next(word for word in words if word in SIZES)


def caption(row: Row, draw: random.Random) -> Turns:
    return [(draw.choice(QUESTIONS["caption"]), row["short_caption"])]


def name(row: Row, draw: random.Random) -> Turns:
    """One of the things of a scene, or a word of a name or a title."""
    words = [icon["shape"] for icon in row["icons"]] if "icons" in row else row["short_caption"].split()
    return [(draw.choice(QUESTIONS["word"]), draw.choice(words))]


def scene_facts(row: Row, draw: random.Random) -> Turns:
    """Questions about the colour, the size, the number and the side of both things, and about what is on a side."""
    found: Turns = []
    for shape, icons in things_of(row).items():
        found += [*_facts(shape, icons), (f"What is at the {_side(icons)}?", shape)]
    return draw.sample(found, FACTS)


def thing_facts(row: Row, draw: random.Random) -> Turns:
    """What the only thing is, and questions about it."""
    shape = row["icons"][0]["shape"]
    return [("What is there?", shape), *draw.sample(_facts(shape, row["icons"]), FACTS - 1)]


def _facts(shape: str, icons: Sequence[Row]) -> Turns:
    return [
        (f"Which colour is the {shape}?", icons[0]["colour"]),
        (f"How large is the {shape}?", icons[0]["size"]),
        (f"How often is the {shape} there?", ("once", "twice")[len(icons) - 1]),
        (f"Where is the {shape}?", _side(icons)),
    ]


def _side(icons: Sequence[Row]) -> str:
    """The half of the picture in whose middle the icons are."""
    across, down = (fmean(icon[axis] for icon in icons) - SIDE / 2 for axis in ("x", "y"))
    if abs(across) > abs(down):
        return "left" if across < 0 else "right"
    return "top" if down < 0 else "bottom"


def icon_facts(row: Row, draw: random.Random) -> Turns:
    """The colour and the size of an icon, and a word of its name."""
    colour, size = icon_attributes(row)
    return draw.sample([("Which colour is it?", colour), ("How large is it?", size), *name(row, draw)], FACTS)


KINDS = {"description": describe, "caption": caption, "word": name, "facts": scene_facts}
OTHER_KINDS = {
    "icons": {"description": describe_icon, "facts": icon_facts},
    "things": {"facts": thing_facts},
}


def scenes(split: str) -> Dataset:
    """Scenes to train on (`"train"`), to choose settings by (`"validation"`), or of held-out combinations
    (`"test"`)."""
    if split == "test":
        return load_scenes("test", size=SIDE)
    rows = load_scenes("train", count=SCENES + VALIDATION, size=SIDE).remove_columns("negatives")
    return rows.select(range(SCENES) if split == "train" else range(SCENES, SCENES + VALIDATION))


def pretraining_scenes() -> list[Dataset]:
    """Scenes that the base model learns to speak about: those to train on, and, three times, as there are fewer, those
    of the held-out combinations of shapes and colours that no test shows. Without them a model would learn that some
    shapes never have a colour, and guess the shapes by the colours."""
    known = set(WithoutImages(scenes("test"))["short_caption"])
    others = load_scenes("test", count=COMBINED, size=SIDE, seed=1)
    captions = WithoutImages(others)["short_caption"]
    return [scenes("train"), *[others.select([n for n, each in enumerate(captions) if each not in known])] * 3]


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


def pretraining_rows(shares: Mapping[tuple[str, str], float]) -> DatasetMixture:
    """The rows of a stage of pretraining, by their shares."""
    stored = [WithoutImages(rows) for rows in pretraining_scenes()]
    drawn = {
        "scenes": data.ConcatDataset(pretraining_scenes()),
        "things": SingleThings(data.ConcatDataset(stored)),
        "icons": icons("train"),
        "clip art": clip_art("train"),
        "texts": data.ConcatDataset(stored),
        "questions": questions("train"),
    }

    def rows(source: str, kind: str) -> Any:
        if source == "questions":
            return drawn[source]
        turns = {**KINDS, **OTHER_KINDS.get(source, {})}[kind]
        return Conversations(drawn[source], turns, about_text=source == "texts")

    return DatasetMixture([DatasetSource(rows(*each), ", ".join(each), share) for each, share in shares.items()])


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
    for row in icons("train"):
        yield from (row["short_caption"], icon_description(row))
    for row in clip_art("train").select_columns(["short_caption", "long_caption"]):
        yield from (row["short_caption"], row["long_caption"])
    for place, row in enumerate(WithoutImages(scenes("train").select(range(1000)))):
        yield from chain.from_iterable(scene_facts(row, random.Random(place)))
    for question in chain.from_iterable(QUESTIONS.values()):
        yield from [f"USER: \n{question} ASSISTANT:"] * 500
