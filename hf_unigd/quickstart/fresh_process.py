"""Checks that a checkpoint works without hf-unigd, as its users load it."""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image


TOLERANCE = 1e-4

SCRIPT = """
import json, sys
sys.modules["hf_unigd"] = None  # importing it would raise
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, file, text = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
image, caption = model.embed(**processor.process_sequences([[Image.open(file)], text]))
print(json.dumps(float(image @ caption)))
"""


@torch.no_grad()
def check_in_fresh_process(model, processor, image: Image.Image, text: str, folder: Path) -> float:
    """
    Loads the checkpoint in `folder` in a process that cannot import hf-unigd, and compares the similarity of `image`
    and `text` with that of `model`.

    Returns:
        The similarity.

    Raises:
        RuntimeError: the checkpoint does not load, or its similarity differs by more than 1e-4.
    """
    first, second = model.embed(**processor.process_sequences([[image], text]))
    expected = float(first @ second)
    with TemporaryDirectory() as temporary:
        file = Path(temporary, "query.png")
        image.save(file)
        result = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(folder), str(file), text], capture_output=True, text=True
        )
    if result.returncode != 0:
        raise RuntimeError(f"The checkpoint does not load in a fresh process:\n{result.stderr}")
    similarity = json.loads(result.stdout.splitlines()[-1])
    if abs(similarity - expected) > TOLERANCE:
        raise RuntimeError(f"The similarity in a fresh process is {similarity}, in this one {expected}.")
    return similarity
