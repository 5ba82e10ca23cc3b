"""The shapes of all measurements, and models and rows of these shapes."""

import io

import numpy as np
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from transformers import AutoModelForImageTextToText, LlavaConfig

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from hf_unigd.quickstart.small_llava import build_processor


TEXT = "a red cat sits on the green grass beside two small blue dogs and looks at people who wave from a window"

# A backbone is (image size, patch size, vision tower, language model), and a layer stack is (width, layers, heads,
# key-value heads, inner width).
SHAPES = {
    "device": "cuda",
    "large": (336, 14, (1024, 24, 16, 16, 4096), (4096, 32, 32, 32, 11008)),  # LLaVA-1.5-7B
    "small": (224, 16, (768, 12, 12, 12, 3072), (896, 24, 14, 2, 4864)),  # CLIP ViT-B/16 and Qwen2-0.5B
    "vocab_size": 32064,
    "max_length": 4096,
    "kernels": ((256, (8, 32), 64), (256, (8, 32), 768), (1024, (8, 32), 768)),  # sequences, lengths, width
    "rows": 128,
    "rows_without_cache": 32,
    "chunk_size": 16,
    "chunk_sizes_without_checkpointing": (8, 4),
    "long_words": 120,
    "stories": 16,
    "images_per_story": 4,
    "teacher_width": 768,
    "embedding_dim": 1024,
    "texts": 512,
    "images": 128,
    "new_tokens": 64,
    "repeats": 3,
}
TINY = {  # in place of the above with `--tiny`
    "device": "cpu",
    "large": (56, 14, (32, 2, 2, 2, 64), (64, 2, 4, 4, 128)),
    "small": (56, 14, (32, 2, 2, 2, 64), (64, 2, 4, 2, 128)),
    "vocab_size": 2048,
    "kernels": ((8, (2, 4), 8), (12, (2, 4), 16)),
    "rows": 8,
    "rows_without_cache": 4,
    "chunk_size": 2,
    "chunk_sizes_without_checkpointing": (2, 1),
    "long_words": 12,
    "stories": 4,
    "images_per_story": 2,
    "embedding_dim": 16,
    "texts": 16,
    "images": 4,
    "new_tokens": 4,
}


def make_text(count: int, seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(TEXT.split(), count).tolist())


def make_jpeg(seed: int, size: tuple[int, int] = (640, 480)) -> bytes:
    """Smooth random colours, which compress as a photograph does: to about 60 kB."""
    coarse = np.random.default_rng(seed).integers(0, 256, (size[1] // 16, size[0] // 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def make_image(seed: int) -> Image.Image:
    return Image.open(io.BytesIO(make_jpeg(seed))).convert("RGB")


def make_model(
    backbone: str = "large", dtype: torch.dtype = torch.bfloat16, position: str = "prompt", **head
) -> tuple[UniGDForConditionalGeneration, UniGDProcessor]:
    """A model that is initialised on the device, and its processor."""
    image_size, patch_size, *stacks = SHAPES[backbone]
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    vision, text = (dict(zip(names, stack, strict=True)) for stack in stacks)
    del vision["num_key_value_heads"]
    processor = build_processor([TEXT, "Summarize the provided image in one word"], image_size, patch_size)
    tokenizer = processor.tokenizer
    config = LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "image_size": image_size,
            "patch_size": patch_size,
            **vision,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": SHAPES["vocab_size"],
            "max_position_embeddings": SHAPES["max_length"],
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **text,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(image_size // patch_size) ** 2,
    )
    torch.manual_seed(0)
    with torch.device(SHAPES["device"]):
        vlm = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model = UniGDForConditionalGeneration.from_vlm(vlm, **head)
    return model, UniGDProcessor(processor, embedding_position=position)


def make_rows(count: int) -> Dataset:
    """Images of 640 x 480 pixels with short captions of 12 words and long captions."""
    features = Features({"image": ImageFeature(), "short_caption": Value("string"), "long_caption": Value("string")})
    columns = {
        "image": [{"bytes": make_jpeg(place), "path": None} for place in range(count)],
        "short_caption": [make_text(12, place) for place in range(count)],
        "long_caption": [make_text(SHAPES["long_words"], 1000 + place) for place in range(count)],
    }
    return Dataset.from_dict(columns, features=features)
