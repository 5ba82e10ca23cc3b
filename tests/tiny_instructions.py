"""A tiny model with soft prompts and instructions, and what is embedded with it."""

import torch

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from tiny_models import make_image, make_vlm


A, B = make_image(1), make_image(2, (40, 20))
INSTRUCTIONS = {"query": "Find the dog.", "document": "Summarize the car.", "colours": "Which red?"}
SYSTEM = {"role": "system", "content": [{"type": "text", "text": "be brief"}]}
CHAT = [SYSTEM, {"role": "user", "content": [{"type": "image", "image": A}, {"type": "text", "text": "what is it"}]}]
SEQUENCES = ["a red cat", A, ["two blue dogs", B], CHAT]


def make_model(**settings):
    tiny = make_vlm("llava")
    torch.manual_seed(0)
    model = UniGDForConditionalGeneration.from_vlm(tiny.model, head_type="mlp", embedding_dim=8)
    model.processor = UniGDProcessor(tiny.processor, instructions=INSTRUCTIONS, **settings)
    model.add_soft_prompts(**model.processor.add_soft_prompts())
    with torch.no_grad():  # so that they differ from the words that they replace
        model.get_input_embeddings().weight[model.processor.soft_prompt_ids] += 0.1
    return model


def embed(model, sequences=SEQUENCES, **instructed):
    with torch.no_grad():
        alone = [model.embed(**model.processor.process_sequences([each], **instructed)) for each in sequences]
    return torch.cat(alone)
