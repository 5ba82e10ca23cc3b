"""Retrieval of the last image, compared with a plain search."""

import pytest
import torch

from hf_unigd.evaluation.embedders import ModelEmbedder
from hf_unigd.evaluation.stories import last_image_recall
from tiny_models import make_image


def make_stories():
    images = {name: make_image(place) for place, name in enumerate("abcdefg")}
    orders = ["abcde", "bacdf", "gfecb", "edcba"]
    return [
        {"captions": [f"{name} {story}" for story in order], "images": [images[story] for story in order]}
        for name, order in zip("wxyz", orders, strict=True)
    ]


def test_candidates_are_the_images_not_seen_earlier_in_the_story(llava):
    model, processor = llava
    stories = make_stories()
    metrics = last_image_recall(model, processor, stories, ks=(1, 2), show_progress=False)

    def embed(sequence):
        with torch.no_grad():
            return model.embed(**processor.process_sequences([sequence]))[0]

    distinct = {image.tobytes(): image for story in stories for image in story["images"]}
    candidates = {key: embed([image]) for key, image in distinct.items()}
    for name, with_images in (("5c", False), ("5c+4i", True)):
        for k in (1, 2):
            hits = 0
            for story in stories:
                query = list(story["captions"])
                if with_images:
                    query = [p for pair in zip(story["captions"], story["images"], strict=True) for p in pair][:-1]
                seen = {image.tobytes() for image in story["images"][:-1]}
                scores = {key: float(embed(query) @ vector) for key, vector in candidates.items() if key not in seen}
                best = sorted(scores, key=scores.get, reverse=True)[:k]
                hits += story["images"][-1].tobytes() in best
            assert metrics[f"{name}_recall_at_{k}"] == pytest.approx(hits / len(stories))


def test_an_ideal_model_finds_every_last_image(llava, monkeypatch):
    """The embedding of every query is replaced by that of its last image."""
    stories = make_stories()
    vectors = {image.tobytes(): torch.eye(7)[place] for place, image in enumerate(make_image(n) for n in range(7))}

    def embed(self, sequences, show_progress=False):
        found = []
        for sequence in (sequences[place] for place in range(len(sequences))):
            story = next((story for story in stories if sequence[0] == story["captions"][0]), None)
            image = sequence[0] if story is None else story["images"][-1]
            found.append(vectors[image.tobytes()])
        return torch.stack(found)

    monkeypatch.setattr(ModelEmbedder, "embed", embed)
    metrics = last_image_recall(*llava, stories)
    assert metrics["5c_recall_at_1"] == metrics["5c+4i_recall_at_1"] == 1


def test_stories_without_a_caption_per_image_raise_an_error_that_names_them(llava):
    stories = make_stories()
    stories[2]["captions"] = stories[2]["captions"][:4]
    with pytest.raises(ValueError, match="Story 2 has 4 captions and 5 images"):
        last_image_recall(*llava, stories)
    with pytest.raises(ValueError, match="no stories"):
        last_image_recall(*llava, [])
