"""Tiny frozen encoders of the three kinds that the Triple Kernel uses, saved to folders."""

from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertModel,
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    Dinov2Config,
    Dinov2Model,
)

from hf_unigd.data import TeacherArguments
from tiny_models import make_tokenizer


_LAYERS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def save_teachers(folder: Path, seed: int = 0, **kwargs) -> TeacherArguments:
    """Saves a DINOv2, a BERT and a CLIP of a few thousand parameters. Returns the arguments that name them."""
    torch.manual_seed(seed)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}

    image = Dinov2Model(Dinov2Config(image_size=16, patch_size=8, mlp_ratio=2, **_LAYERS))
    image.save_pretrained(folder / "image")
    BitImageProcessorPil(**size).save_pretrained(folder / "image")

    tokenizer = make_tokenizer([], bos="<s>")
    tokenizer.model_max_length = 64
    text = BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **_LAYERS))
    text.save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")

    tokenizer = make_tokenizer([], bos="<s>")
    tokenizer.model_max_length = 16
    cross = CLIPModel(
        CLIPConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "max_position_embeddings": 16,
                "eos_token_id": tokenizer.eos_token_id,
                "bos_token_id": tokenizer.bos_token_id,
                **_LAYERS,
            },
            vision_config={"image_size": 16, "patch_size": 8, **_LAYERS},
            projection_dim=12,
        )
    )
    cross.save_pretrained(folder / "cross")
    CLIPProcessor(CLIPImageProcessorPil(**size), tokenizer).save_pretrained(folder / "cross")
    return TeacherArguments(**{f"{name}_teacher": str(folder / name) for name in ("image", "text", "cross")}, **kwargs)
