"""A CLIP of about a million parameters, trained on icons in a minute: a cross-modal teacher without a download."""

import copy
import random

import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from tqdm.auto import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, LlavaProcessor, PreTrainedTokenizerFast


CONTEXT_LENGTH = 32  # tokens of a text


def build_clip(
    vlm_processor: LlavaProcessor, hidden_size: int = 128, layers: int = 4, seed: int = 0
) -> tuple[CLIPModel, CLIPProcessor]:
    """A randomly initialised CLIP for the images and the words of `vlm_processor`, and its own processor."""
    tokenizer = ending_texts(vlm_processor.tokenizer)
    stack = {
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_attention_heads": hidden_size // 32,
    }
    config = CLIPConfig(
        vision_config={
            "image_size": vlm_processor.image_processor.crop_size["height"],
            "patch_size": vlm_processor.patch_size,
            "num_hidden_layers": layers,
            **stack,
        },
        text_config={
            "vocab_size": len(tokenizer),
            "max_position_embeddings": CONTEXT_LENGTH,
            "num_hidden_layers": 2,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **stack,
        },
        projection_dim=hidden_size,
    )
    torch.manual_seed(seed)
    return CLIPModel(config), CLIPProcessor(vlm_processor.image_processor, tokenizer)


def ending_texts(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A copy of a tokenizer that ends each text with a token of its own. CLIP embeds a text where it ends; without
    such a token it would take the token with the largest number, and not read what follows."""
    end = "<|end|>"
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"eos_token": end})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    tokenizer.model_max_length = CONTEXT_LENGTH
    return tokenizer


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
        inputs = processor.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        loss = model(**inputs, pixel_values=pixels[rows], return_loss=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.2f}")
    model.eval()
