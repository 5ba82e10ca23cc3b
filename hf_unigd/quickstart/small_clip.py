"""A CLIP of about a million parameters, trained on icons in a minute: a cross-modal teacher without a download."""

import random

import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, LlavaProcessor


def build_clip(processor: LlavaProcessor, hidden_size: int = 128, layers: int = 4, seed: int = 0) -> CLIPModel:
    """A randomly initialised CLIP for the images and the tokens of `processor`."""
    tokenizer = processor.tokenizer
    stack = {
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_attention_heads": hidden_size // 32,
    }
    config = CLIPConfig(
        vision_config={
            "image_size": processor.image_processor.crop_size["height"],
            "patch_size": processor.patch_size,
            "num_hidden_layers": layers,
            **stack,
        },
        text_config={
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 32,
            "num_hidden_layers": 2,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **stack,
        },
        projection_dim=hidden_size,
    )
    torch.manual_seed(seed)
    return CLIPModel(config)


def train_clip(
    model: CLIPModel,
    processor: CLIPProcessor,
    pairs: list[tuple[Image.Image, list[str]]],
    steps: int,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> None:
    """Trains with CLIP's own loss on images with several texts each, one of which is drawn at every step."""
    draw = random.Random(seed)
    pixels = processor.image_processor([image for image, _ in pairs], return_tensors="pt")["pixel_values"]
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    model.train()
    progress = tqdm(range(steps), desc="Training the CLIP", unit="step")
    for _ in progress:
        rows = draw.sample(range(len(pairs)), batch_size)
        texts = [draw.choice(pairs[row][1]) for row in rows]
        inputs = processor.tokenizer(texts, padding=True, return_tensors="pt")
        loss = model(**inputs, pixel_values=pixels[rows], return_loss=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.2f}")
    model.eval()
