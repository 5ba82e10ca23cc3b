"""An offline source of interleaved text and pictures: short illustrated stories told with the icons.

Every story has five scenes of a sentence and a picture. Something appears, something else joins it, and from then on
one of the two changes its colour, and is called by its place in the story alone:

    Here comes the red heart. [picture] The blue tree joins it. [picture] The first turns green. [picture]
    The first turns black. [picture] At last the first turns pink. [picture of a pink heart]

Stories come in pairs that share subjects and colours but not the order, so that another picture ends them. The answer
says what the last picture shows. The task that comes with them is VIST's, as FROMAGe set it up: find the last picture.
"""

import random

from datasets import Dataset

from .icons import COLOURS, draw_icon, icon_glyphs


SCENES = 5
_IMAGE_TAG = "<image>"


def load_stories(split: str = "train", count: int = 4000, cast: int = 200, size: int = 48, seed: int = 0) -> Dataset:
    """
    Stories as rows with the columns `messages` and `images` (to train on), and `captions` (to search by).

    Every other pair of training stories shows its last picture alone, and every picture also comes alone, with what it
    shows as the answer: one learns from sequences of all the kinds that are searched by and for.

    Args:
        split: `"train"` or `"test"`: other stories of the same cast.
        count: How many, two of each pair.
        cast: How many of the icons take part, those with the shortest names first.
        size: Side of the pictures, in pixels.
        seed: Of the stories.

    Raises:
        ImportError: the icon font is not installed.
        ValueError: an unknown split.
    """
    if split not in ("train", "test"):
        raise ValueError(f"The stories have the splits 'train' and 'test', not {split!r}.")
    names = cast_of_icons(cast)
    draw = random.Random(f"{seed}-{split}")
    rows = []
    for pair in range(count // 2):
        shown = 1 if split == "train" and pair % 2 else SCENES
        rows += [{**story, "shown": shown} for story in _tell_pair(draw, names)]
    if split == "train":
        rows += [
            {"captions": [], "icons": [icon], "colours": [colour], "answer": describe(icon, colour), "shown": 1}
            for icon in names
            for colour in COLOURS
        ]
    return Dataset.from_list([{**row, "side": size} for row in rows]).with_transform(_render)


def cast_of_icons(count: int) -> list[str]:
    """The icons that stories are told of: those whose names have the fewest words, then letters."""
    return sorted(icon_glyphs(), key=lambda name: (name.count("_"), len(name), name))[:count]


def describe(icon: str, colour: str) -> str:
    return f"It shows the {colour} {_words(icon)}."


def captions_of(icon: str, colour: str) -> list[str]:
    """The sentences that may stand before a picture of `icon` in `colour`."""
    name = _words(icon)
    turns = [f"The {place} turns {colour}." for place in ("first", "second")]
    return [
        f"Here comes the {colour} {name}.",
        f"The {colour} {name} joins it.",
        *turns,
        f"At last the first turns {colour}.",
    ]


def _tell_pair(draw: random.Random, names: list[str]) -> list[dict]:
    """Two stories of the same two subjects in the same colours, one of them with the subjects exchanged at the end."""
    hero, other = draw.sample(names, 2)
    colours = draw.sample(list(COLOURS), SCENES)
    stories = [
        # The hero comes first and changes three times.
        ([hero, other, hero, hero, hero], ["first", "first", "first"]),
        # The hero comes second and changes twice; the one that came first ends the story.
        ([other, hero, hero, hero, other], ["second", "second", "first"]),
    ]
    return [
        {
            "captions": [
                f"Here comes the {colours[0]} {_words(icons[0])}.",
                f"The {colours[1]} {_words(icons[1])} joins it.",
                f"The {places[0]} turns {colours[2]}.",
                f"The {places[1]} turns {colours[3]}.",
                f"At last the {places[2]} turns {colours[4]}.",
            ],
            "icons": icons,
            "colours": colours,
            "answer": describe(icons[-1], colours[-1]),
        }
        for icons, places in stories
    ]


def _words(icon: str) -> str:
    return icon.replace("_", " ")


def _render(rows: dict[str, list]) -> dict[str, list]:
    """Rows of the columns that users see; pictures are drawn only when they are read."""
    drawn: dict[str, list] = {"messages": [], "images": [], "captions": rows["captions"]}
    glyphs = icon_glyphs()
    names = ("captions", "icons", "colours", "answer", "shown", "side")
    for captions, icons, colours, answer, shown, side in zip(*(rows[name] for name in names), strict=True):
        tags = [""] * (len(icons) - shown) + [_IMAGE_TAG] * shown
        content = "".join(f"{caption} {tag}" for caption, tag in zip(captions or [""], tags, strict=True))
        drawn["messages"].append([{"role": "user", "content": content}, {"role": "assistant", "content": answer}])
        drawn["images"].append(
            [
                draw_icon(glyphs[icon], colour, "large", side)
                for icon, colour in list(zip(icons, colours, strict=True))[-shown:]
            ]
        )
    return drawn
