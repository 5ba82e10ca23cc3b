"""`UniGDTrainer` takes models, adapters, processors and arguments of other kinds, or refuses them by name."""

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import (
    TrainingArguments,
)

from hf_unigd import UniGDForConditionalGeneration, UniGDModel, UniGDProcessor
from hf_unigd.trainer import UniGDTrainer, UniGDTrainingArguments
from hf_unigd.trainer.arguments import UniGDModelConfig
from hf_unigd.trainer.loading import load_for_training
from tiny_models import make_vlm
from trainer_cases import LORA, make_args, make_model, make_rows, make_trainer


def test_arguments_may_be_plain_or_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, processor = make_model()
    assert UniGDTrainer(model, processing_class=processor).args.learning_rate == UniGDTrainingArguments().learning_rate
    plain = TrainingArguments(
        "out", learning_rate=3e-3, max_steps=2, per_device_train_batch_size=4, hub_token="secret", use_cpu=True
    )
    trainer = UniGDTrainer(model, plain, train_dataset=make_rows(), processing_class=processor)
    assert isinstance(trainer.args, UniGDTrainingArguments)
    assert trainer.args.learning_rate == 3e-3 and trainer.args.hub_token == "secret"
    trainer.train()
    with pytest.raises(ValueError, match="use_liger_kernel"):
        UniGDTrainer(model, TrainingArguments("out", use_liger_kernel=True), processing_class=processor)
    with pytest.raises(TypeError, match="`args` must be UniGDTrainingArguments or TrainingArguments, got dict"):
        UniGDTrainer(model, {}, processing_class=processor)


def test_the_model_may_be_a_name_or_a_path(tmp_path):
    tiny = make_vlm()
    tiny.model.save_pretrained(tmp_path / "plain")
    tiny.processor.save_pretrained(tmp_path / "plain")
    trainer = UniGDTrainer(str(tmp_path / "plain"), make_args(tmp_path / "out"), train_dataset=make_rows())
    trainer.train()
    trainer.save_model()
    again = UniGDTrainer(tmp_path / "out", make_args(tmp_path / "again"), train_dataset=make_rows())
    weights, reloaded = trainer.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in reloaded.items())
    for setting in ({"embedding_position": "last_slice"}, {"image_pooling": "last"}):
        with pytest.raises(ValueError, match=f"was saved with `{next(iter(setting))}=.*Leave"):
            load_for_training(UniGDModelConfig(model_name_or_path=str(tmp_path / "out"), **setting))
    adapted = UniGDTrainer(
        str(tmp_path / "plain"), make_args(tmp_path / "adapter"), train_dataset=make_rows(), peft_config=LORA
    )
    adapted.save_model()
    with pytest.raises(ValueError, match=r"adapter is an adapter.*hf-unigd merge"):
        UniGDTrainer(tmp_path / "adapter", make_args(tmp_path), train_dataset=make_rows())


def test_the_settings_of_a_saved_head_may_be_repeated(tmp_path):
    tiny = make_vlm()
    settings = {"head_type": "linear", "embedding_dim": 16, "matryoshka_dims": [8, 4]}
    UniGDForConditionalGeneration.from_vlm(tiny.model, **settings).save_pretrained(tmp_path)
    UniGDProcessor(tiny.processor).save_pretrained(tmp_path)
    model, *_ = load_for_training(UniGDModelConfig(model_name_or_path=str(tmp_path), **settings))
    assert model.config.matryoshka_dims == [4, 8, 16]
    with pytest.raises(ValueError, match=r"already has a head\. Leave out `matryoshka_dims`"):
        load_for_training(UniGDModelConfig(model_name_or_path=str(tmp_path), matryoshka_dims=[2]))


def test_models_and_processors_of_other_kinds_are_refused(tmp_path):
    tiny = make_vlm()
    for model, message in (
        (tiny.model, r"got LlavaForConditionalGeneration.*from_vlm\(model\)"),
        (UniGDModel.from_vlm(tiny.model), "got UniGDModel.*from_pretrained"),
        (None, "got NoneType"),
    ):
        with pytest.raises(TypeError, match=message):
            UniGDTrainer(model, make_args(tmp_path), processing_class=UniGDProcessor(tiny.processor))
    with pytest.raises(ValueError, match="must be a UniGDProcessor, got NoneType"):
        UniGDTrainer(UniGDForConditionalGeneration.from_vlm(tiny.model), make_args(tmp_path))
    model, processor = make_model()
    model.processor = processor
    assert UniGDTrainer(model, make_args(tmp_path)).processing_class is processor


def test_the_users_own_adapter_trains_the_head_or_is_refused(tmp_path):
    model, processor = make_model(head_type="linear", embedding_dim=8)
    plain = LoraConfig(r=4, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"'embedding_head' in its `modules_to_save`.*`peft_config`"):
        UniGDTrainer(get_peft_model(model, plain), make_args(tmp_path), processing_class=processor)
    model, processor = make_model(head_type="linear", embedding_dim=8)
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embedding_head"])
    adapter = get_peft_model(copy.deepcopy(model), config)
    trainer = UniGDTrainer(adapter, make_args(tmp_path), train_dataset=make_rows(), processing_class=processor)
    before = copy.deepcopy(adapter.get_base_model().embedding_head.state_dict())
    trainer.train()
    after = adapter.get_base_model().embedding_head.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(ValueError, match=r"`model` is a PeftModel and `peft_config` is given too"):
        UniGDTrainer(adapter, make_args(tmp_path), processing_class=processor, peft_config=LORA)
    with pytest.raises(TypeError, match="got LlavaForConditionalGeneration"):
        UniGDTrainer(get_peft_model(make_vlm().model, plain), make_args(tmp_path), processing_class=processor)
    model.add_soft_prompts(**processor.add_soft_prompts())
    with pytest.raises(ValueError, match=r"soft prompts \[.*in its `trainable_token_indices`"):
        UniGDTrainer(get_peft_model(model, config), make_args(tmp_path), processing_class=processor)


def test_an_adapter_loaded_for_inference_is_refused(tmp_path):
    trainer = make_trainer(tmp_path / "adapter", peft_config=LORA)
    trainer.save_model()
    model, processor = make_model()
    kwargs = {"train_dataset": make_rows(), "processing_class": processor}
    frozen = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"No parameter of `model` is trained.*is_trainable=True"):
        UniGDTrainer(frozen, make_args(tmp_path), **kwargs)
    UniGDTrainer(
        PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True), make_args(tmp_path), **kwargs
    ).train()


# Settings of the user that the head or the soft prompts also need.


def test_the_users_adapter_settings_are_extended_not_overwritten(tmp_path):
    config = LoraConfig(
        r=4,
        target_modules=["q_proj"],
        layers_to_transform=[1],
        modules_to_save=["lm_head"],
        trainable_token_indices={"embed_tokens": [5, 6]},
    )
    trainer = make_trainer(tmp_path, peft_config=config, soft_prompts=True)
    used = trainer.model.peft_config["default"]
    assert set(used.modules_to_save) == {"lm_head", "embedding_head"}
    assert {5, 6, *trainer.processing_class.soft_prompt_ids} == set(used.trainable_token_indices["embed_tokens"])
    adapted = {name.split(".lora_")[0] for name, _ in trainer.model.named_parameters() if ".lora_A" in name}
    assert adapted == {"base_model.model.vlm.model.language_model.layers.1.self_attn.q_proj"}
    assert config.trainable_token_indices == {"embed_tokens": [5, 6]}  # the object of the user is not changed
    trainer.save_model()
    assert LoraConfig.from_pretrained(tmp_path).target_modules == set(used.target_modules)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "PromptTuningConfig, which has no"),
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "IA3Config, which has no `trainable_token_ind"),
        (LoraConfig(inference_mode=True), "inference_mode=True"),
    ],
)
def test_settings_that_cannot_hold_the_head_or_the_soft_prompts_are_refused(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, peft_config=config, soft_prompts=True)
