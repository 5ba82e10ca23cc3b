"""How often generated captions of unseen pictures are right."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from PIL import Image

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from hf_unigd.data.icons import COLOURS as ICON_COLOURS
from hf_unigd.data.scene_pictures import COLOURS, SHAPES

from .corpus import QUESTIONS, clip_art, icon_description, icons, scenes


ICONS = 300
LONGEST = 64  # tokens of a caption
BATCH_SIZE = 100


@torch.no_grad()
def generate_captions(
    model: UniGDForConditionalGeneration, processor: UniGDProcessor, images: Sequence[Image.Image], question: str
) -> list[str]:
    """What the model answers to a question about each image, greedily."""
    model.eval()
    said: list[str] = []
    for start in range(0, len(images), BATCH_SIZE):
        sequences = [[image, question] for image in images[start : start + BATCH_SIZE]]
        batch = processor.process_sequences(sequences, prompted=False, padding_side="left").to(model.device)
        generated = model.generate(**batch, max_new_tokens=LONGEST, do_sample=False)
        said += processor.batch_decode(generated[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in said]


def caption_accuracy(model: UniGDForConditionalGeneration, processor: UniGDProcessor) -> dict[str, dict[str, float]]:
    """
    The shares of captions that are right, of pictures that training has not shown: scenes of held-out combinations
    (kinds, colours, place, and all of these), held-out icons (the first word of the name, all words, the colour), and
    held-out clip art (a word of the title or a keyword, and a word of the title).
    """
    drawn: dict[str, Any] = {
        "scenes": scenes("test")[:],
        "icons": icons("test")[:ICONS],
        "clip art": clip_art("test")[:],
    }
    said = {
        name: generate_captions(model, processor, rows["image"], QUESTIONS["description"][0])
        for name, rows in drawn.items()
    }
    described = [icon_description(row) for row in icons("test").select(range(ICONS))]
    found = {
        "scenes": [judge_scene(*each) for each in zip(said["scenes"], drawn["scenes"]["long_caption"], strict=True)],
        "icons": [judge_icon(*each) for each in zip(said["icons"], described, strict=True)],
        "clip art": [
            judge_clip_art(*each) for each in zip(said["clip art"], drawn["clip art"]["long_caption"], strict=True)
        ],
    }
    return {
        name: {part: round(fmean(each[part] for each in judged), 4) for part in judged[0]}
        for name, judged in found.items()
    }


def judge_scene(said: str, true: str) -> dict[str, bool]:
    """Whether a long caption of a scene names its kinds, its colours, and the place of one thing beside the other,
    each for itself and all together. A caption may begin with either thing. A thing is known by its kind or colour."""
    one, other = read_scene(said), read_scene(true)
    by_colour, other_by_colour = (dict(things.values()) for things in (one, other))
    by_kind, other_by_kind = ({kind: side for kind, (_, side) in things.items()} for things in (one, other))
    return {
        "kinds": one.keys() == other.keys(),
        "colours": by_colour.keys() == other_by_colour.keys(),
        "place": by_kind == other_by_kind or by_colour == other_by_colour,
        "all": one == other,
    }


def read_scene(caption: str) -> dict[str, tuple[str | None, str | None]]:
    """The colour of each kind that a long caption of a scene names, and the side on which it says that this is."""
    found: dict[str, tuple[str | None, str | None]] = {}
    sides = {"left": "left", "right": "right", "top": "top", "bottom": "bottom"}
    side = colour = None
    sentences = caption.split(". ")
    for word in (sentences[1] if len(sentences) > 1 else "").lower().replace(",", "").rstrip(".").split():
        side = sides.get(word, side)
        colour = word if word in COLOURS else colour
        kind = next((shape for shape in SHAPES if word in (shape, f"{shape}s")), None)
        if kind is not None:
            found[kind] = (colour, side)
            colour = None
    return found


def judge_short_caption(said: str, true: str) -> dict[str, bool]:
    """Whether a short caption of a scene names its kinds, and its colours."""
    one, other = (caption.lower().replace(".", "").replace(",", "").split() for caption in (said, true))
    names = {form: shape for shape in SHAPES for form in (shape, f"{shape}s")}
    return {
        "kinds": {names[word] for word in one if word in names} == {names[word] for word in other if word in names},
        "colours": set(COLOURS) & set(one) == set(COLOURS) & set(other),
    }


def judge_icon(said: str, true: str) -> dict[str, bool]:
    """Whether a caption begins with the first word of an icon's name, has exactly its words, and its colour."""
    (names, colour), (true_names, true_colour) = _read_icon(said), _read_icon(true)
    return {
        "first word": names[:1] == true_names[:1],
        "all words": sorted(names) == sorted(true_names),
        "colour": colour == true_colour,
    }


def _read_icon(caption: str) -> tuple[list[str], str]:
    """The words of the name, and the colour, of "arrow left, a small red icon."."""
    name, _, rest = caption.partition(",")
    return name.split(), next((word for word in rest.split() if word in ICON_COLOURS), "")


def judge_clip_art(said: str, true: str) -> dict[str, bool]:
    (title, words), (true_title, true_words) = _read_clip_art(said), _read_clip_art(true)
    return {"a word of title or keywords": bool(words & true_words), "a word of the title": bool(title & true_title)}


def _read_clip_art(caption: str) -> tuple[set[str], set[str]]:
    """The words of the title, and those of the title and the keywords."""
    title, _, rest = caption.partition(". Keywords: ")
    keywords = rest.partition(".")[0].replace(",", "")
    # Words as short as "of" are in many titles.
    own = {word for word in title.rstrip(".").split() if len(word) > 2}
    return own, own | set(keywords.split())
