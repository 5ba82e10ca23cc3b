"""An offline source of images: the Material Design icons of `fonticon-materialdesignicons7`, drawn with Pillow.

Each icon has a compositional name (`account_arrow_left`), which is its short caption. It is drawn in several colours
and sizes, and the long caption also names these.
"""

import random
from collections import Counter
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from datasets import Dataset
from PIL import Image, ImageDraw, ImageFont


COLOURS = {
    "red": "#c62828",
    "orange": "#ef6c00",
    "green": "#2e7d32",
    "blue": "#1565c0",
    "purple": "#6a1b9a",
    "pink": "#d81b60",
    "brown": "#5d4037",
    "black": "#111111",
}
# Font size of the icon, as a fraction of the side of the image.
SIZES = {"small": 0.8, "large": 0.95}
HELD_OUT = 1000


def load_icons(split: str = "train", views: int = 1, size: int = 48, seed: int = 0) -> Dataset:
    """
    Loads the icons as rows with the columns `image`, `short_caption`, `long_caption` and `icon`.

    The choice of the held-out icons depends only on the names of all icons, so no held-out icon is ever trained on.
    The name of a held-out icon is a new combination of words that occur in training names, because no model could
    guess a word that it has never seen. Icons that look the same count as one icon.

    Args:
        split: `"train"`, or `"test"` for the 1,000 held-out icons.
        views: Number of images per icon. Colour and size are drawn anew for each of them.
        size: Side of the images, in pixels.
        seed: Seed of the random colours and sizes.

    Raises:
        ImportError: the icon font is not installed.
        ValueError: the split is unknown.
    """
    if split not in ("train", "test"):
        raise ValueError(f"The icons have the splits 'train' and 'test', not {split!r}.")
    glyphs = icon_glyphs()
    held_out = _held_out(tuple(glyphs))
    names = [name for name in sorted(glyphs) if (name in held_out) == (split == "test")]
    draw = random.Random(f"{seed}-{split}")
    rows: dict[str, list] = {"icon": [], "glyph": [], "attributes": []}
    for _ in range(views):
        for name in names:
            rows["icon"].append(name)
            rows["glyph"].append(glyphs[name])
            rows["attributes"].append(
                {
                    "colour": draw.choice(list(COLOURS)),
                    "size": draw.choice(list(SIZES)),
                    "side": size,
                }
            )
    return Dataset.from_dict(rows).with_transform(_render)


def short_caption(icon: str) -> str:
    return icon.replace("_", " ")


def long_caption(icon: str, colour: str, size: str) -> str:
    """A sentence that begins with the name, so that a model says at the summary token what it has seen."""
    return f"{short_caption(icon)}, a {size} {colour} icon."


def named_words(caption: str) -> list[str]:
    """The words that a caption in the form of [`long_caption`] begins with."""
    return caption.split(", a ")[0].split()


def icon_captions(rows: Dataset) -> list[str]:
    """The short and long captions of rows of [`load_icons`], whose images are not drawn."""
    stored = rows.with_format(None)
    captions = [short_caption(icon) for icon in stored["icon"]]
    for icon, attributes in zip(stored["icon"], stored["attributes"], strict=True):
        captions.append(long_caption(icon, attributes["colour"], attributes["size"]))
    return captions


def draw_icon(glyph: str, colour: str, size: str, side: int) -> Image.Image:
    image = Image.new("RGB", (side, side), "white")
    image.paste(COLOURS[colour], mask=glyph_mask(glyph, round(side * SIZES[size]), side))
    return image


@cache
def glyph_mask(glyph: str, font_size: int, side: int) -> Image.Image:
    """A square mask with the font character in its middle. Sizes are in pixels."""
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).text((side / 2, side / 2), glyph, fill=255, font=_font(font_size), anchor="mm")
    return mask


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_font_file(), size)


def _render(rows: dict[str, list]) -> dict[str, list]:
    """Turns stored rows into the columns that users see. Images are drawn only when rows are read."""
    drawn: dict[str, list] = {"image": [], "short_caption": [], "long_caption": [], "icon": rows["icon"]}
    for icon, glyph, attributes in zip(rows["icon"], rows["glyph"], rows["attributes"], strict=True):
        side = attributes.pop("side")
        drawn["image"].append(draw_icon(glyph, side=side, **attributes))
        drawn["short_caption"].append(short_caption(icon))
        drawn["long_caption"].append(long_caption(icon, **attributes))
    return drawn


@cache
def _held_out(names: tuple[str, ...], taught: int = 10) -> frozenset[str]:
    """Multi-word names whose every word also occurs in at least `taught` of the remaining icons."""
    left = Counter(word for name in names for word in set(name.split("_")))
    shuffled = sorted(names)
    random.Random(0).shuffle(shuffled)
    held_out: set[str] = set()
    for name in shuffled:
        words = set(name.split("_"))
        if len(held_out) < HELD_OUT and len(words) > 1 and all(left[word] > taught for word in words):
            held_out.add(name)
            left.subtract(words)
    return frozenset(held_out)


@cache
def icon_glyphs() -> dict[str, str]:
    """Returns the font character of each icon by name. Of icons that look the same, the shortest name is kept."""
    _font_file()
    from fonticon_mdi7 import MDI7

    icons: dict[bytes, tuple[str, str]] = {}
    for name in sorted(vars(MDI7), key=lambda name: (len(name), name), reverse=True):
        if not name.startswith("_"):
            glyph = font_character(name)
            icons[draw_icon(glyph, "black", "large", 64).tobytes()] = (name, glyph)
    return dict(icons.values())


def font_character(name: str) -> str:
    """The font character of one icon by name."""
    _font_file()
    from fonticon_mdi7 import MDI7

    return getattr(MDI7, name).split(".", 1)[1]


def _font_file() -> str:
    spec = find_spec("fonticon_mdi7")
    if spec is None or spec.origin is None:
        raise ImportError("The icon font is not installed: `pip install 'hf-unigd[quickstart]'`.")
    return str(Path(spec.origin).parent / "fonts" / "materialdesignicons-webfont.ttf")
