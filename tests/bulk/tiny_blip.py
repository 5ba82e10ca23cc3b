"""A tiny BLIP-2, which has no chat template: it continues a text."""

import torch
from transformers import AutoModelForImageTextToText, Blip2Config, Blip2Processor, BlipImageProcessorPil

from tiny_models.building import VISION, make_tokenizer


def save_blip(folder):
    tokenizer = make_tokenizer([], bos="<s>")
    size = {"height": 16, "width": 16}
    processor = Blip2Processor(BlipImageProcessorPil(size=size), tokenizer, num_query_tokens=4)
    text_config = {
        "model_type": "opt",
        "vocab_size": len(tokenizer) + 4,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 256,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = Blip2Config(
        vision_config={**VISION, "image_size": 16, "patch_size": 8},
        qformer_config={**VISION, "vocab_size": 50, "encoder_hidden_size": 32, "cross_attention_frequency": 1},
        text_config=text_config,
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
