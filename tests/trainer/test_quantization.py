"""QLoRA, if bitsandbytes is installed."""

import pytest
import torch
from datasets import Dataset

from hf_unigd.trainer import UniGDModelConfig, UniGDTrainer, UniGDTrainingArguments
from hf_unigd.trainer.loading import load_for_training
from tiny_models import make_image, make_vlm


bitsandbytes = pytest.importorskip("bitsandbytes")


def test_lora_trains_on_four_bit_weights(tmp_path, monkeypatch):
    # With AVX512-BF16, bitsandbytes packs frozen weights by blocks of 64 columns, and tiny ones have 32.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    tiny = make_vlm()
    tiny.model.save_pretrained(tmp_path / "vlm")
    tiny.processor.save_pretrained(tmp_path / "vlm")
    model_args = UniGDModelConfig(
        model_name_or_path=str(tmp_path / "vlm"),
        load_in_4bit=True,
        use_peft=True,
        soft_prompts=True,
        head_type="linear",
        embedding_dim=8,
    )
    model, processor, peft_config = load_for_training(model_args)
    layers = [module for module in model.vlm.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert layers and model.is_loaded_in_4bit
    assert {parameter.dtype for parameter in model.embedding_head.parameters()} == {torch.float32}
    rows = Dataset.from_dict({"image": [make_image(n) for n in range(8)], "caption": [f"cat {n}" for n in range(8)]})
    args = UniGDTrainingArguments(
        trust_caption_columns=True,
        output_dir=str(tmp_path / "out"),
        max_steps=2,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
    )
    trainer = UniGDTrainer(model, args, train_dataset=rows, processing_class=processor, peft_config=peft_config)
    before = [parameter.clone() for parameter in trainer.model.parameters() if parameter.requires_grad]
    trainer.train()
    after = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert any(not torch.equal(first, second) for first, second in zip(before, after, strict=True))
