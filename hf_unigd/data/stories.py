"""An offline source of interleaved texts and images: short stories that are illustrated with the icons.

Every story has five scenes, each a sentence and an image. In the first two scenes two subjects appear. In each later
scene one of them changes its colour, and the sentence calls it only "the first" or "the second":

    Here comes the red heart. [image] The blue tree joins it. [image] The first turns green. [image]
    The first turns black. [image] At last the first turns pink. [image of a pink heart]

Stories come in pairs with the same subjects and colours in another order, so that their last images differ. The answer
says what the last image shows. The stories serve for the task that FROMAGe set up on VIST: finding the last image.
"""

import random

from datasets import Dataset

from .icons import COLOURS, draw_icon, icon_glyphs, short_caption


SCENES = 5
_IMAGE_TAG = "<image>"


def load_stories(split: str = "train", count: int = 4000, cast: int = 200, size: int = 48, seed: int = 0) -> Dataset:
    """
    Loads stories as rows with the columns `messages` and `images` (to train on) and `captions` (for queries).

    In every second pair of training stories only the last image is shown. The training split also has a row for each
    icon in each colour: a single image, with its description as the answer. A model thus trains on every kind of
    sequence that serves as a query or as a candidate of the task.

    Args:
        split: `"train"` or `"test"`. The splits tell different stories about the same icons.
        count: Number of stories, two per pair.
        cast: Number of icons that stories are told about. Those with the shortest names are taken.
        size: Side of the images, in pixels.
        seed: Seed of the random stories.

    Raises:
        ImportError: the icon font is not installed.
        ValueError: the split is unknown.
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
    """Returns the icons that stories are told about: those whose names have the fewest words, then letters."""
    return sorted(icon_glyphs(), key=lambda name: (name.count("_"), len(name), name))[:count]


def describe(icon: str, colour: str) -> str:
    return f"It shows the {colour} {short_caption(icon)}."


def captions_of(icon: str, colour: str) -> list[str]:
    """Returns the sentences that may precede an image of `icon` in `colour`."""
    name = short_caption(icon)
    turns = [f"The {place} turns {colour}." for place in ("first", "second")]
    return [
        f"Here comes the {colour} {name}.",
        f"The {colour} {name} joins it.",
        *turns,
        f"At last the first turns {colour}.",
    ]


def _tell_pair(draw: random.Random, names: list[str]) -> list[dict]:
    """Tells two stories about the same two subjects in the same colours that end with different subjects."""
    hero, other = draw.sample(names, 2)
    colours = draw.sample(list(COLOURS), SCENES)
    stories = [
        # The hero comes first and changes three times.
        ([hero, other, hero, hero, hero], ["first", "first", "first"]),
        # The hero comes second and changes twice. The other subject, which came first, ends the story.
        ([other, hero, hero, hero, other], ["second", "second", "first"]),
    ]
    return [
        {
            "captions": [
                f"Here comes the {colours[0]} {short_caption(icons[0])}.",
                f"The {colours[1]} {short_caption(icons[1])} joins it.",
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


def _render(rows: dict[str, list]) -> dict[str, list]:
    """Turns stored rows into the columns that users see. Images are drawn only when rows are read."""
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
