"""What the targets of the structure loss find themselves: where a model comes that reproduces its teachers."""

from pathlib import Path
from typing import Any

import torch

from hf_unigd.data import Teachers
from hf_unigd.data.example import Slice
from hf_unigd.evaluation.embedders import SentenceEmbedder
from hf_unigd.kernels import alignment_kernel

from . import measuring, sugar
from .arms import TargetArm
from .training import EVALUATION_BATCH_SIZE


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
    told = list(sugar.albums("test"))
    texts = [[Slice({"type": "text", "text": caption}) for caption in album["captions"]] for album in told]
    images = [[Slice({"type": "image", "image": image}) for image in album["images"]] for album in told]
    places = {image.key: image for own in images for image in own}
    candidates, numbers = list(places.values()), {key: number for number, key in enumerate(places)}
    queries = {
        "5c": texts,
        "5c+4i": [
            [part for pair in zip(*each, strict=True) for part in pair][:-1]
            for each in zip(texts, images, strict=True)
        ],
    }
    found = {}
    for name, sequences in queries.items():
        similarity = similarities(teachers, sequences, candidates)
        hits = []
        for row, own in zip(similarity, images, strict=True):
            earlier = {numbers[image.key] for image in own[:-1]}
            last = numbers[own[-1].key]
            row[sorted(earlier - {last})] = -torch.inf
            hits.append((row > row[last]).sum())
        ranks = torch.stack(hits)
        found |= {f"{name}_recall_at_{k}": (ranks < k).float().mean().item() for k in ks}
    return found


def similarities(teachers: Teachers, sequences: list[list[Slice]], candidates: list[Slice]) -> torch.Tensor:
    """The logarithms of the targets of sequences and single slices, of shape `(sequences, candidates)`."""
    slices = [part for sequence in sequences for part in sequence]
    lengths = torch.tensor([0, *(len(sequence) for sequence in sequences)])
    return alignment_kernel(
        teachers(slices),
        lengths.cumsum(0),
        teachers(candidates),
        torch.arange(len(candidates) + 1),
        bandwidth=1.0,
        per_pair_bandwidth=True,
        normalize="content",
        modality_columns=teachers.modality_columns(),
        x_modalities=torch.tensor([part.modality for part in slices]),
        y_modalities=torch.tensor([part.modality for part in candidates]),
    )
