"""What the targets of the structure loss find themselves: where a model comes that reproduces its teachers."""

from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from hf_unigd.data import Teachers
from hf_unigd.data.example import IMAGE, Slice
from hf_unigd.evaluation.embedders import SentenceEmbedder
from hf_unigd.kernels import alignment_kernel
from hf_unigd.trainer.losses import StructureLoss

from . import measuring, sugar
from .arms import TargetArm
from .training import EVALUATION_BATCH_SIZE


TARGETS = StructureLoss()  # with the settings that arms are trained with
Found = tuple[Teachers, str]  # and the folder of the teacher that compares pictures with texts


def settings(arm: TargetArm, folder: Path) -> dict[str, Any]:
    return {"clip_steps": sugar.CLIP_STEPS}


def train(arm: TargetArm, seed: int, learning_rate: None, folder: Path) -> tuple[Found, list]:
    """Loads the teachers of a base model."""
    chosen = sugar.make_teachers(folder)
    return (Teachers(chosen), chosen.cross_teacher), []


def measure(found: Found) -> dict[str, float]:
    """What is measured of an arm of Sugar, as far as it does not need a model that generates."""
    teachers, cross_teacher = found
    embedder = SentenceEmbedder(cross_teacher, EVALUATION_BATCH_SIZE)
    return {**measuring.measure(embedder), **album_recall(teachers)}


def album_recall(teachers: Teachers, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """The recall of the last pictures of albums by the targets, named as [`~hf_unigd.evaluation.last_image_recall`]
    does, and among the same candidates."""
    distinct: dict[int, Slice] = {}
    albums: list[list[int]] = []  # the keys of the captions and the pictures of each, in turn
    for album in sugar.albums("test"):
        own = [
            Slice({"type": kind, kind: content})
            for pair in zip(album["captions"], album["images"], strict=True)
            for kind, content in zip(("text", "image"), pair, strict=True)
        ]
        albums.append([part.key for part in own])
        distinct |= dict(zip(albums[-1], own, strict=True))
    features = dict(zip(distinct, teachers(list(distinct.values())), strict=True))
    numbers = {
        key: number for number, key in enumerate(key for key, part in distinct.items() if part.modality == IMAGE)
    }
    found = {}
    for name, queries in {"5c": [own[::2] for own in albums], "5c+4i": [own[:-1] for own in albums]}.items():
        similarity = alignment_kernel(
            torch.stack([features[key] for query in queries for key in query]),
            torch.tensor([0, *(len(query) for query in queries)]).cumsum(0),
            torch.stack([features[key] for key in numbers]),
            torch.arange(len(numbers) + 1),
            bandwidth=TARGETS.bandwidth,
            per_pair_bandwidth=True,
            normalize=TARGETS.normalization,
            modality_columns=teachers.modality_columns(),
            x_modalities=torch.tensor([distinct[key].modality for query in queries for key in query]),
            y_modalities=torch.full((len(numbers),), IMAGE),
        )
        ranks = []
        for row, own in zip(similarity, albums, strict=True):
            *earlier, last = (numbers[key] for key in own[1::2])
            row[[place for place in earlier if place != last]] = -torch.inf
            ranks.append(int((row > row[last]).sum()))
        found |= {f"{name}_recall_at_{k}": fmean(rank < k for rank in ranks) for k in ks}
    return found
