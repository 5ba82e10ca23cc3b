"""A checkpoint, an adapter and rows on disk, and what the bulk commands make of them."""

import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import torch
from datasets import Dataset, Features, Image, Value

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from tiny_models import make_image, make_vlm


TESTS = Path(__file__).parents[1]


def save_checkpoint(folder: Path, seed: int = 0, **head) -> str:
    tiny = make_vlm(seed=seed)
    UniGDForConditionalGeneration.from_vlm(tiny.model, **head).save_pretrained(folder)
    UniGDProcessor(tiny.processor).save_pretrained(folder)
    return str(folder)


def captioned_images(count: int = 10) -> Dataset:
    """Images of several sizes with captions of several lengths."""
    columns = {
        "image": [make_image(place, (24 + 8 * (place % 3), 20)) for place in range(count)],
        "short_caption": [f"a red cat {place} " * (1 + place % 4) for place in range(count)],
        "id": [f"id-{place}" for place in range(count)],
    }
    return Dataset.from_dict(
        columns, Features({"image": Image(), "short_caption": Value("string"), "id": Value("string")})
    )


def embedding_of(model, processor, *sequences) -> torch.Tensor:
    """Each alone, without anything of the command."""
    with torch.no_grad():
        return torch.cat([model.embed(**processor.process_sequences([sequence])) for sequence in sequences])


def read_vectors(file: Path, column: str = "anchor_embedding") -> torch.Tensor:
    table = pq.read_table(file)
    return torch.tensor(table[column].combine_chunks().flatten().to_numpy()).reshape(table.num_rows, -1)


def files_of(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def arguments(**kwargs) -> list[str]:
    words = []
    for name, value in kwargs.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def environment() -> dict[str, str]:
    paths = [str(TESTS.parent), str(TESTS), str(Path(__file__).parent)]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


def write_jsonl(file: Path, rows: list[dict]) -> str:
    names = {name for row in rows for name in row}
    file.write_text("\n".join(json.dumps({name: row.get(name) for name in sorted(names)}) for row in rows))
    return str(file)
