"""Albums: stories of five captioned pictures that all show the same two things, in other places and sizes."""

import random
from itertools import product
from typing import Any

from datasets import Dataset
from torch.utils import data

from hf_unigd.data.scene_pictures import RELATIONS, SIZES, Scene, Thing, draw_picture, place_icons

from .corpus import SIDE, Row, WithoutImages, things_of


LENGTH = 5


class Albums(data.Dataset):
    """
    Stories, in the columns of [`~hf_unigd.data.load_stories`]: `messages` and `images` to train on, and `captions` for
    queries. The answer is the long caption of the last picture.

    Unlike in the icon stories of that function, every caption names all that its picture shows, so that an arm of few
    steps can learn to find the last one.

    Args:
        scenes: The scenes whose things albums are about, one each.
        is_training: Whether every second album shows its last picture alone, after all captions, as queries without
            pictures end.
    """

    def __init__(self, scenes: Dataset, is_training: bool = False):
        self.scenes, self.is_training = WithoutImages(scenes), is_training

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, place: int) -> Row:
        told = tell(self.scenes[place], random.Random(place))
        draw = random.Random(f"{place} pictures")
        images = [draw_picture(place_icons(scene, SIDE, draw), SIDE) for scene in told]
        captions = [f"{str(scene).capitalize()}." for scene in told]
        first_shown = LENGTH - 1 if self.is_training and place % 2 else 0
        parts: list[dict[str, Any]] = []
        for number, caption in enumerate(captions):
            parts.append({"type": "text", "text": f"{caption} "})
            if number >= first_shown:
                parts.append({"type": "image"})
        answer = {"role": "assistant", "content": told[-1].long_caption()}
        return {
            "messages": [{"role": "user", "content": parts}, answer],
            "images": images[first_shown:],
            "captions": captions,
        }


def tell(row: Row, draw: random.Random) -> list[Scene]:
    """Different scenes with the things of a scene, as many of them as in it."""
    (one, icons), (other, other_icons) = things_of(row).items()
    scenes = [
        Scene(
            Thing(one, icons[0]["colour"], size, len(icons)),
            relation,
            Thing(other, other_icons[0]["colour"], other_size, len(other_icons)),
        )
        for relation, size, other_size in product(RELATIONS, SIZES, SIZES)
    ]
    return draw.sample(scenes, LENGTH)
