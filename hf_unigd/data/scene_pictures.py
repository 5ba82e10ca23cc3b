"""What a scene holds, where it stands in the picture, and the words for it.

A scene is two things, one beside or above the other. A thing is one icon, or two equal ones, with a colour and a size:

    a red star to the left of two small blue cars

The four quarters of a picture are cells of one icon each. A thing has one half: two icons fill its cells, a single one
stands in their middle. So the relation is never in doubt: things beside each other are at the same height.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace

from PIL import Image

from .icons import font_character, glyph_mask


# Icons of the font whose names are single words, and whose silhouettes can be told apart at 18 pixels. No name of an
# icon or a colour begins with a vowel, so that words can change places without a change of "a" into "an".
SHAPES = (
    *("star", "heart", "car", "tree", "rocket", "home", "bell", "key"),
    *("cup", "flower", "crown", "duck", "flag", "lamp", "snowflake", "cloud"),
)
POPULAR = SHAPES[:4]  # drawn three times as often as the others
COLOURS = {
    "red": "#d32f2f",
    "yellow": "#fbc02d",
    "green": "#388e3c",
    "cyan": "#4dd0e1",
    "blue": "#1976d2",
    "purple": "#7b1fa2",
    "pink": "#f48fb1",
    "brown": "#6d4c41",
    "black": "#111111",
}
# Font size of an icon, as a fraction of the side of its cell.
SIZES = {"small": 0.55, "large": 0.85}
NUMBERS = ("a", "two")
# The direction from the second thing to the first, to the right and down.
RELATIONS = {"to the left of": (-1, 0), "to the right of": (1, 0), "above": (0, -1), "below": (0, 1)}
CONVERSE = {
    "to the left of": "to the right of",
    "to the right of": "to the left of",
    "above": "below",
    "below": "above",
}
SIDES = {
    "to the left of": "on the left",
    "to the right of": "on the right",
    "above": "at the top",
    "below": "at the bottom",
}


@dataclass(frozen=True)
class Thing:
    """One or two equal icons. What a caption does not say of them, their colour or their size, is None."""

    shape: str
    colour: str | None
    size: str | None = None
    count: int = 1

    def __str__(self) -> str:
        words = [NUMBERS[self.count - 1], self.size, self.colour, self.noun]
        return " ".join(word for word in words if word)

    @property
    def noun(self) -> str:
        return self.shape + "s" * (self.count - 1)


@dataclass(frozen=True)
class Scene:
    """Two things of different shapes and colours; `str` of it is a caption. A relation that the caption does not say,
    as in "a red star and two blue cars", is None."""

    first: Thing
    relation: str | None
    second: Thing

    @property
    def things(self) -> tuple[Thing, Thing]:
        return self.first, self.second

    def __str__(self) -> str:
        return f"{self.first} {self.relation or 'and'} {self.second}"

    @property
    def converse(self) -> "Scene":
        """The same scene, seen from its second thing."""
        return Scene(self.second, self.relation and CONVERSE[self.relation], self.first)

    def with_thing(self, place: int, **changes) -> "Scene":
        """The scene with other values of its thing at `place`, 0 or 1."""
        things = list(self.things)
        things[place] = replace(things[place], **changes)
        return Scene(things[0], self.relation, things[1])

    def long_caption(self) -> str:
        """Three sentences of some forty words about the scene, whose relation is not None."""
        assert self.relation is not None
        is_plural = self.first.count > 1
        number = ("two", "three", "four")[self.first.count + self.second.count - 2]
        return (
            f"On a white ground there are {number} drawn icons. {SIDES[self.relation].capitalize()} "
            f"{'are' if is_plural else 'is'} {self.first}, and {SIDES[CONVERSE[self.relation]]} "
            f"{'are' if self.second.count > 1 else 'is'} {self.second}. The {self.first.noun} "
            f"{'are' if is_plural else 'is'} {self.relation} the {self.second.noun}."
        )


def place_icons(scene: Scene, side: int, draw: random.Random) -> list[dict]:
    """
    Places the icons of a scene, each within 1/32 of the side around its place.

    Args:
        scene: The scene, in which nothing is None.
        side: Side of the picture, in pixels.
        draw: Draws the shifts.

    Returns:
        A dict for each icon: `shape`, `colour`, `size`, and the pixels `x` and `y` of its centre from the top left.
    """
    cell, jitter = side // 2, side // 32
    assert scene.relation is not None
    across, down = RELATIONS[scene.relation]
    icons = []
    for thing, sign in zip(scene.things, (1, -1), strict=True):
        shifts = (0,) if thing.count == 1 else (-1, 1)  # along the half, in halves of a cell
        for shift in shifts:
            # The axis of the relation holds the direction, and the other one the shift.
            x, y = (sign * across, shift) if across else (shift, sign * down)
            icons.append(
                {
                    "shape": thing.shape,
                    "colour": thing.colour,
                    "size": thing.size,
                    "x": cell + x * cell // 2 + draw.randint(-jitter, jitter),
                    "y": cell + y * cell // 2 + draw.randint(-jitter, jitter),
                }
            )
    return icons


def draw_picture(icons: list[Mapping], side: int) -> Image.Image:
    """Draws placed icons on white, in RGB."""
    picture = Image.new("RGB", (side, side), "white")
    cell = side // 2
    for icon in icons:
        mask = glyph_mask(font_character(icon["shape"]), round(cell * SIZES[icon["size"]]), cell)
        picture.paste(COLOURS[icon["colour"]], (icon["x"] - cell // 2, icon["y"] - cell // 2), mask)
    return picture
