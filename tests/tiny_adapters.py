"""Adapters as training leaves them, made without training: every trained tensor is set to something else."""

import torch
from peft import LoraConfig

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from hf_unigd.trainer.adapters import add_adapter, save_adapter_companions
from tiny_models import make_image, make_vlm


SEQUENCES = ["a red cat", [make_image(1)], ["two blue dogs", make_image(2, (40, 20))]]


def make_adapter(folder, family="llava", on="plain", head_type="mlp", tied=False):
    """Saves a base model, `"plain"` or `"ours"`, and an adapter on it in `folder`; the adapted model and processor."""
    tiny = make_vlm(family)
    if tied:
        tiny.model.config.tie_word_embeddings = tiny.model.config.text_config.tie_word_embeddings = True
        tiny.model.tie_weights()
        assert tiny.model.lm_head.weight is tiny.model.get_input_embeddings().weight
    head = {"head_type": head_type, "embedding_dim": None if head_type == "none" else 8}
    torch.manual_seed(1)
    if on == "plain":
        tiny.model.save_pretrained(folder / "base")
        tiny.processor.save_pretrained(folder / "base")
        model = UniGDForConditionalGeneration.from_vlm_pretrained(folder / "base", **head)
    else:
        model = UniGDForConditionalGeneration.from_vlm(tiny.model, **head)
        model.processor = UniGDProcessor(tiny.processor)
        model.save_pretrained(folder / "base")
        model = UniGDForConditionalGeneration.from_pretrained(folder / "base")
    processor = UniGDProcessor(tiny.processor)
    model.add_soft_prompts(**processor.add_soft_prompts())
    model.processor = processor
    peft_model = add_adapter(model, processor, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad and parameter.dim():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    peft_model.eval()
    peft_model.save_pretrained(folder / "adapter")
    save_adapter_companions(peft_model, folder / "adapter")
    return model, processor


def answers(model, processor):
    batch = processor.process_sequences(SEQUENCES, padding_side="left")
    return processor.batch_decode(model.generate(**batch, max_new_tokens=8, do_sample=False))
