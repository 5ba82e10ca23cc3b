"""Models and rows for the tests of evaluation."""

import hashlib

import numpy as np
import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipProcessor,
)

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from hf_unigd.evaluation.embedders import ModelEmbedder
from hf_unigd.evaluation.row_evaluation import evaluate_rows
from hf_unigd.modeling.instructions_unigd import without_instruction
from tiny_models import make_image, make_vlm
from tiny_models.building import VISION, make_tokenizer


WIDTH = 6


class HashEmbedder:
    """Gives each content a random vector of its own, and equal contents the same. It remembers what it embeds."""

    name, dtype = "hash", "float32"

    def __init__(self, vectors=None):
        self.description = {"model": self.name, "revision": None, "dtype": self.dtype}
        self.vectors = vectors or {}
        self.embedded = []

    def instruction(self, side):
        return None

    def find_reserved(self, text):
        return None

    def check(self, example):
        pass

    def embed(self, sequences, show_progress=False):
        keys = [content_of(sequences[place]) for place in range(len(sequences))]
        self.embedded += keys
        return torch.stack([self.vector(key) for key in keys])

    def vector(self, key):
        if key in self.vectors:
            return torch.nn.functional.normalize(torch.tensor(self.vectors[key], dtype=torch.float32), dim=0)
        seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "little")
        vector = np.random.default_rng(seed).standard_normal(WIDTH)
        return torch.tensor(vector / np.linalg.norm(vector), dtype=torch.float32)


class Speaker(ModelEmbedder):
    """A model whose answers are given."""

    def __init__(self, answers):
        tiny = make_vlm()
        super().__init__(UniGDForConditionalGeneration.from_vlm(tiny.model), UniGDProcessor(tiny.processor), "tiny", 2)
        self.answers = iter(answers)
        self.asked = []

        def generate(input_ids, **kwargs):
            self.asked += self.processor.batch_decode(input_ids, skip_special_tokens=True)
            texts = [next(self.answers) for _ in input_ids]
            said = self.processor.tokenizer(texts, padding=True, return_tensors="pt", padding_side="right")[
                "input_ids"
            ]
            return torch.cat([input_ids, said], 1)

        self.model.generate = generate


def content_of(sequence):
    """The texts and pixels of a sequence."""
    turns = without_instruction(sequence)
    parts = turns[0]["content"] if isinstance(turns, list) and isinstance(turns[0], dict) else turns
    parts = parts if isinstance(parts, (list, tuple)) else [parts]
    parts = [part.get("text") or part.get("image") if isinstance(part, dict) else part for part in parts]
    return tuple(part if isinstance(part, str) else part.tobytes() for part in parts)


def _text(tokenizer, **kwargs):
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {**VISION, "vocab_size": len(tokenizer), "max_position_embeddings": 64, **ids, **kwargs}


def make_clip(folder):
    """Saves a tiny CLIP with random weights. Returns it and its processor."""
    tokenizer = make_tokenizer([], bos="<s>")
    tokenizer.model_max_length = 64
    vision = {"image_size": 16, "patch_size": 8, **VISION}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=_text(tokenizer), projection_dim=24)).eval()
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return _saved(model, CLIPProcessor(images, tokenizer), folder)


def make_siglip(folder):
    """Saves a tiny SigLIP with random weights. Returns it and its processor."""
    tokenizer = make_tokenizer([], bos="<s>")
    tokenizer.model_max_length = 64
    vision = {"image_size": 16, "patch_size": 8, **VISION}
    torch.manual_seed(0)
    model = SiglipModel(SiglipConfig(vision_config=vision, text_config=_text(tokenizer, projection_size=32))).eval()
    return _saved(model, SiglipProcessor(SiglipImageProcessorPil(size={"height": 16, "width": 16}), tokenizer), folder)


def _saved(model, processor, folder):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def evaluated(rows, embedder=None, **kwargs):
    return evaluate_rows(embedder or HashEmbedder(), rows, "rows", {}, show_progress=False, **kwargs)


def karpathy_rows(images=12, seed=0, same=0):
    """Rows of an image with five captions, as `datasets` holds Karpathy's split. Two of the images, 7 and `same`, have
    equal pixels, and some captions occur again under another image."""
    draw = np.random.default_rng(seed)
    rows = []
    for place in range(images):
        words = [f"cat {place} {number}" for number in range(3)] + [f"dog {draw.integers(5)}" for _ in range(2)]
        ids = [100 * place + number for number in range(5)]
        image = make_image(same if place == 7 else place)
        rows.append({"image": image, "caption": words, "image_id": f"img{place}", "caption_id": ids})
    return rows
