"""An offline benchmark: scenes of two to four drawn icons, with what retrieval and the compositional benchmarks ask.

A configuration has the columns of the data set that it stands for:

| configuration | after | columns |
|---|---|---|
| `scenes` | captioned images | `image`, `short_caption`, `long_caption`, in training also `negatives` |
| `scenes/sugarcrepe` | SugarCrepe | `image`, `caption`, `negative_caption`, `kind` (its seven kinds) |
| `scenes/sugarcrepe_pp` | SugarCrepe++ | `image`, `caption`, `caption2`, `negative_caption`, `kind` (its five kinds) |
| `scenes/winoground` | Winoground | `image_0`, `image_1`, `caption_0`, `caption_1`, `kind` |
| `scenes/pope` | POPE | `image`, `question`, `answer`, `category` |
| `scenes/chats` | four questions of `scenes/pope` about a picture, to train on | `image`, `messages` |

All have a column `icons` (`icons_0` and `icons_1` for pairs of images) too: what the picture holds, and where.
"""

import random
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from functools import cache
from itertools import accumulate, islice, product
from typing import Any

from datasets import Dataset

from .scene_pictures import COLOURS, POPULAR, RELATIONS, SHAPES, SIZES, Scene, Thing, draw_picture, place_icons


SIDE = 64
KINDS = ("replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att", "add_obj", "add_att")
PLUS_PLUS = 5  # of the kinds are those of SugarCrepe++
SWAPS = ("swap_obj", "swap_att")
NEGATIVES = 2  # of a training row
CHAT_QUESTIONS = 4
TRAIN_COUNT = 16_000
# What the test split alone shows and names: three colours of each shape. Every third shape has the same three.
HELD_OUT = {
    (shape, colour)
    for (row, shape), (column, colour) in product(enumerate(SHAPES), enumerate(COLOURS))
    if (row - column) % 3 == 0
}


def load_scenes(
    split: str = "train", configuration: str = "retrieval", count: int | None = None, size: int = SIDE, seed: int = 0
) -> Dataset:
    """
    Loads rows of a configuration. The pictures are drawn when rows are read.

    A shape in a colour is a combination, and a third of them are held out: the pictures and texts of the test split,
    the wrong ones among them, name no combination that those of the training split name.

    In the rows for retrieval, a short caption is true of one picture alone. Those of the training split have two wrong
    captions too.

    Args:
        split: `"train"` or `"test"`.
        configuration: `"retrieval"`, `"sugarcrepe"`, `"sugarcrepe_pp"`, `"winoground"`, `"pope"` or `"chats"`.
        count: Number of rows: by default 16,000 for training, and for testing 500 pictures, 210 wrong captions of each
            kind, 400 pairs of pictures, or 600 questions.
        size: Side of the pictures, in pixels.
        seed: Seed of the scenes, their places and their captions.

    Raises:
        ImportError: the icon font is not installed.
        ValueError: the split or the configuration is unknown, or there are not so many scenes with different captions.
    """
    if split not in ("train", "test"):
        raise ValueError(f"The scenes have the splits 'train' and 'test', not {split!r}.")
    if configuration not in CONFIGURATIONS:
        raise ValueError(f"The scenes have the configurations {', '.join(CONFIGURATIONS)}, not {configuration!r}.")
    make_rows, test_count = CONFIGURATIONS[configuration]
    if count is None:
        count = TRAIN_COUNT if split == "train" else test_count
    draw = random.Random(f"{seed}-{configuration}-{split}")
    rows = list(islice(make_rows(split, size, draw), count))
    if len(rows) < count:
        raise ValueError(f"There are {len(rows)} rows of the {configuration} configuration, fewer than {count}.")
    return Dataset.from_list([{**row, "side": size} for row in rows]).with_transform(_render)


def write_negative(kind: str, scene: Scene, said: Scene, split: str, draw: random.Random) -> tuple[Scene | Thing, str]:
    """
    Writes a wrong caption of one of SugarCrepe's kinds, which differs from a right one in what the kind names.

    Args:
        kind: One of `KINDS`.
        scene: The whole scene.
        said: What a caption says: the scene with some values left out.
        split: Whose combinations of shapes and colours the caption may name.
        draw: Draws the place and the wrong value.

    Returns:
        What the right caption says, and the wrong caption. The right caption of `add_obj` says one thing alone. That
        of `replace_att` says the attribute that is replaced, and that of `add_att` does not say the one that is added.
    """
    if kind in SWAPS:
        return said, str(swap(kind, said))
    if kind == "replace_rel":
        return said, str(replace(said, relation=draw.choice(_others(RELATIONS, {said.relation}))))
    place = draw.randrange(2)
    thing = scene.things[place]
    # Things of one picture differ in colour: that a caption of two red things is wrong could be known without it.
    shown, colours = {each.shape for each in scene.things}, {each.colour for each in scene.things}
    if kind == "add_obj":
        colour, count = draw.choice(_others(COLOURS, colours)), draw.choice((1, 2))
        shape = draw.choice(_others(_shapes(colour, split), shown))
        return said.things[place], f"{said.things[place]} and {Thing(shape, colour, count=count)}"
    if kind == "replace_obj":
        shape = draw.choice(_others(_shapes(thing.colour, split), shown))
        return said, str(said.with_thing(place, shape=shape))
    attribute = draw.choice(["colour", "size"])
    values = {"colour": _others(_colours(thing.shape, split), colours), "size": _others(SIZES, {thing.size})}
    right, wrong = getattr(thing, attribute), draw.choice(values[attribute])
    positive = said.with_thing(place, **{attribute: right if kind == "replace_att" else None})
    return positive, str(said.with_thing(place, **{attribute: wrong}))


def swap(kind: str, scene: Scene) -> Scene:
    """The scene of the same words in another order: its things change places (`swap_obj`) or colours (`swap_att`)."""
    if kind == "swap_obj":
        return Scene(scene.second, scene.relation, scene.first)
    return scene.with_thing(0, colour=scene.second.colour).with_thing(1, colour=scene.first.colour)


def _retrieval_rows(split: str, size: int, draw: random.Random) -> Iterator[dict[str, Any]]:
    told: set[Scene] = set()
    # The two orders of a pair of things tell the same scenes.
    distinct = len(_pairs(split)[0]) * len(RELATIONS) * 4 // 2
    for scene in _scenes(split, draw):
        plain = scene.with_thing(0, size=None).with_thing(1, size=None)
        if plain not in told:
            told |= {plain, plain.converse}
            said = _with_some_sizes(scene, draw)
            kinds = list(KINDS)
            # Without such captions, "and" would give the wrong captions of `add_obj` away.
            if split == "train" and draw.random() < 0.25:
                said = replace(said, relation=None)
                kinds = _others(KINDS, {"replace_rel", "swap_obj"})  # there is no relation to be wrong
            row = {
                "icons": place_icons(scene, size, draw),
                "short_caption": str(said),
                "long_caption": scene.long_caption(),
            }
            if split == "train":
                chosen = draw.sample(kinds, NEGATIVES)
                row["negatives"] = [write_negative(kind, scene, said, split, draw)[1] for kind in chosen]
            yield row
        if len(told) == 2 * distinct:
            return


def _sugarcrepe_rows(split: str, size: int, draw: random.Random) -> Iterator[dict[str, Any]]:
    for place, scene in enumerate(_scenes(split, draw)):
        kind = KINDS[place % len(KINDS)]
        right, wrong = write_negative(kind, scene, _with_some_sizes(scene, draw), split, draw)
        icons = place_icons(scene, size, draw)
        yield {"icons": icons, "caption": str(right), "negative_caption": wrong, "kind": kind}


def _sugarcrepe_pp_rows(split: str, size: int, draw: random.Random) -> Iterator[dict[str, Any]]:
    for place, scene in enumerate(_scenes(split, draw)):
        kind = KINDS[place % PLUS_PLUS]
        right, wrong = write_negative(kind, scene, _with_some_sizes(scene, draw), split, draw)
        assert isinstance(right, Scene)
        captions = {"caption": str(right), "caption2": str(right.converse), "negative_caption": wrong}
        yield {"icons": place_icons(scene, size, draw), **captions, "kind": kind}


def _winoground_rows(split: str, size: int, draw: random.Random) -> Iterator[dict[str, Any]]:
    for place, scene in enumerate(_scenes(split, draw)):
        kind = SWAPS[place % len(SWAPS)]
        said = [each.with_thing(0, size=None).with_thing(1, size=None) for each in (scene, swap(kind, scene))]
        yield {
            "icons_0": place_icons(scene, size, draw),
            "icons_1": place_icons(swap(kind, scene), size, draw),
            "caption_0": str(said[0]),
            "caption_1": str(said[1]),
            "kind": kind,
        }


def _pope_rows(split: str, size: int, draw: random.Random) -> Iterator[dict[str, Any]]:
    number = 0
    for scene, questions in _questions(split, draw):
        icons = place_icons(scene, size, draw)
        for question in questions:
            yield {"icons": icons, "question_id": number, **question}
            number += 1


def _chat_rows(split: str, size: int, draw: random.Random) -> Iterator[dict[str, Any]]:
    for scene, questions in _questions(split, draw):
        messages = []
        # Not all, so that the number of answers "yes" is not known.
        for place, question in enumerate(draw.sample(questions, CHAT_QUESTIONS)):
            image = "" if place else "<image>"
            messages += [
                {"role": "user", "content": f"{image}{question['question']}"},
                {"role": "assistant", "content": question["answer"]},
            ]
        yield {"icons": place_icons(scene, size, draw), "messages": messages}


def _questions(split: str, draw: random.Random) -> Iterator[tuple[Scene, list[dict[str, str]]]]:
    """
    Scenes, and six questions about each: for each category, one about what it shows and one about what it does not.

    Scenes come in pairs. What one shows is what the other is asked for in vain, so that no question gives its answer
    away.
    """
    scenes = _scenes(split, draw)
    for pair in zip(scenes, scenes, strict=True):
        shapes = [[thing.shape for thing in scene.things] for scene in pair]
        own = [_others(shapes[place], shapes[1 - place]) for place in range(2)]
        popular = [[shape for shape in each if shape in POPULAR] for each in own]
        if not all(popular):
            continue
        asked = {
            category: [draw.choice(each) for each in choices]
            for category, choices in (("random", own), ("popular", popular))
        }
        for place, scene in enumerate(pair):
            one, other = draw.sample(scene.things, 2)
            things = {category: (named[place], named[1 - place]) for category, named in asked.items()}
            things["adversarial"] = (f"{one.colour} {one.shape}", f"{other.colour} {one.shape}")
            questions = [
                {"question": f"Is there a {thing} in the image?", "answer": answer, "category": category}
                for category, named in things.items()
                for answer, thing in zip(("yes", "no"), named, strict=True)
            ]
            yield scene, questions


# What makes the rows of a configuration, and how many the test split has.
CONFIGURATIONS: dict[str, tuple[Callable[[str, int, random.Random], Iterator[dict[str, Any]]], int]] = {
    "retrieval": (_retrieval_rows, 500),
    "sugarcrepe": (_sugarcrepe_rows, 210 * len(KINDS)),
    "sugarcrepe_pp": (_sugarcrepe_pp_rows, 210 * PLUS_PLUS),
    "winoground": (_winoground_rows, 400),
    "pope": (_pope_rows, 600),
    "chats": (_chat_rows, 600),
}


def _scenes(split: str, draw: random.Random) -> Iterator[Scene]:
    """Scenes without end. Of a pair of things, each in the other's colour is of the split too."""
    pairs, weights = _pairs(split)
    while True:
        (things,) = draw.choices(pairs, cum_weights=weights)
        first, second = (
            Thing(shape, colour, draw.choice(list(SIZES)), draw.choice((1, 2))) for shape, colour in things
        )
        yield Scene(first, draw.choice(list(RELATIONS)), second)


@cache
def _pairs(split: str) -> tuple[list[tuple[tuple[str, str], tuple[str, str]]], list[int]]:
    """The pairs of things that scenes of a split may have, as shapes and colours, and their cumulative weights."""
    pairs = [
        ((shape, colour), (other_shape, other_colour))
        for shape, other_shape in product(SHAPES, repeat=2)
        for colour, other_colour in product(COLOURS, repeat=2)
        if shape != other_shape
        and colour != other_colour
        and {colour, other_colour} <= set(_colours(shape, split)) & set(_colours(other_shape, split))
    ]
    return pairs, list(accumulate(_weight(one) * _weight(other) for (one, _), (other, _) in pairs))


def _weight(shape: str) -> int:
    return 3 if shape in POPULAR else 1


def _colours(shape: str, split: str) -> list[str]:
    return [colour for colour in COLOURS if ((shape, colour) in HELD_OUT) == (split == "test")]


def _shapes(colour: str | None, split: str) -> list[str]:
    return [shape for shape in SHAPES if ((shape, colour) in HELD_OUT) == (split == "test")]


def _others(values: Iterable[str], taken: Collection[str | None]) -> list[str]:
    return [value for value in values if value not in taken]


def _with_some_sizes(scene: Scene, draw: random.Random) -> Scene:
    """The scene, in which each size is said or not, with equal chances."""
    for place in range(2):
        if draw.random() < 0.5:
            scene = scene.with_thing(place, size=None)
    return scene


def _render(rows: dict[str, list]) -> dict[str, list]:
    """Draws the pictures: `image` of `icons`, `image_0` of `icons_0`, `image_1` of `icons_1`."""
    sides = rows.pop("side")
    pictures = {
        name.replace("icons", "image"): [
            draw_picture(icons, side) for icons, side in zip(rows[name], sides, strict=True)
        ]
        for name in rows
        if name.startswith("icons")
    }
    return pictures | rows
