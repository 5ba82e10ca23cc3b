"""The model and the rows that the runs of `accelerate launch` train on."""

import pytest
from datasets import Dataset

from tiny_models import make_image, make_vlm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny LLaVA and rows to train it on."""
    folder = tmp_path_factory.mktemp("run")
    tiny = make_vlm()
    tiny.model.save_pretrained(folder / "vlm")
    tiny.processor.save_pretrained(folder / "vlm")
    rows = {
        "image": [make_image(place) for place in range(32)],
        "short_caption": [f"cat {place}" for place in range(32)],
        "long_caption": ["A cat." + " on the grass" * (place % 5) for place in range(32)],
    }
    Dataset.from_dict(rows).save_to_disk(str(folder / "rows"))
    return folder
