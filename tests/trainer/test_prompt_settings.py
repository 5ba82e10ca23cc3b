"""Prompts, soft prompts without LoRA, and the temperature, as arguments of training."""

import math

import pytest
import torch
from peft import LoraConfig, PeftModel, TrainableTokensConfig
from safetensors.torch import load_file

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from hf_unigd.cli.main import main
from hf_unigd.hub import load_checkpoint
from hf_unigd.trainer import UniGDTrainer, UniGDTrainingArguments
from hf_unigd.trainer.arguments import UniGDModelConfig
from hf_unigd.trainer.loading import load_for_training
from tiny_models import make_image, make_vlm
from trainer_cases import make_args, make_rows, make_trainer


SEQUENCES = ["a red cat", [make_image(1)], ["two blue dogs", make_image(2)]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompt_settings")
    for name in ("plain", "tied"):
        tiny = make_vlm()
        if name == "tied":
            tiny.model.config.tie_word_embeddings = tiny.model.config.text_config.tie_word_embeddings = True
            tiny.model.tie_weights()
        tiny.model.save_pretrained(folder / name)
        tiny.processor.save_pretrained(folder / name)
    make_rows().save_to_disk(str(folder / "rows"))
    return folder


def load(folder, name="plain", **settings):
    return load_for_training(UniGDModelConfig(model_name_or_path=str(folder / name), **settings))


def train(folder, output, **arguments):
    arguments = {
        "model_name_or_path": folder / "plain",
        "dataset_name": folder / "rows",
        "trust_caption_columns": "true",
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 0.01,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": "true",
        "output_dir": output,
        **arguments,
    }
    main(["train", *(part for name, value in arguments.items() for part in (f"--{name}", str(value)))])
    return load_checkpoint(str(output))


def text_of(processor, sequence):
    ids = processor.process_sequences([sequence])["input_ids"][0]
    return processor.decode(ids[ids != processor.image_token_id], skip_special_tokens=True)


# Hand-written prompts.


def test_the_prompts_of_a_yaml_file_and_of_flags_are_trained_with_and_saved(folder, tmp_path):
    (tmp_path / "recipe.yaml").write_text("image_prompt: What is in the image\ntext_prompt: overridden\n")
    flags = {"config": tmp_path / "recipe.yaml", "text_prompt": "What is in the text"}
    model, processor = train(folder, tmp_path / "out", **flags)
    assert processor.prompts == {"image": "What is in the image", "text": "What is in the text"}
    assert "What is in the image" in text_of(processor, [make_image()])
    assert "a red cat\nWhat is in the text" in text_of(processor, "a red cat")
    # The weights are those of a trainer that was given such a processor.
    plain = make_vlm()
    other = UniGDTrainer(
        UniGDForConditionalGeneration.from_vlm_pretrained(folder / "plain"),
        make_args(tmp_path / "by_hand", max_steps=3),
        train_dataset=make_rows(),
        processing_class=UniGDProcessor(plain.processor, prompts=processor.prompts),
    )
    other.train()
    batch = processor.process_sequences(SEQUENCES)
    torch.testing.assert_close(model.embed(**batch), other.model.eval().embed(**batch), atol=1e-5, rtol=0)


def test_a_checkpoint_keeps_its_prompts_unless_others_are_given(folder, tmp_path):
    model, processor, _ = load(folder, image_prompt="What is in the image")
    assert processor.prompts["text"] == "Summarize the provided text in one word"
    model.processor = processor
    model.save_pretrained(tmp_path / "saved")
    assert load(tmp_path, "saved")[1].prompts == processor.prompts
    changed = load(tmp_path, "saved", text_prompt="In one word")[1].prompts
    assert changed == {"image": "What is in the image", "text": "In one word"}


def test_soft_prompts_start_from_the_prompts_that_are_given(folder):
    prompts = {"image": "a yellow car", "text": "three people"}
    model, processor, _ = load(folder, image_prompt=prompts["image"], text_prompt=prompts["text"], soft_prompts=True)
    hard = UniGDProcessor(make_vlm().processor, prompts=prompts)
    for sequence in SEQUENCES[:2]:
        table = model.get_input_embeddings().weight
        soft_ids, hard_ids = (each.process_sequences([sequence])["input_ids"][0] for each in (processor, hard))
        assert not torch.equal(soft_ids, hard_ids)
        assert torch.equal(table[soft_ids], table[hard_ids])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_prompt": " "}, "The image prompt must be a text that is not empty"),
        ({"text_prompt": "a <image>"}, "text prompt 'a <image>' holds the reserved token '<image>'"),
        (
            {"image_prompt": "In one word", "embedding_position": "last_slice"},
            "`image_prompt` would have no effect with `embedding_position='last_slice'`",
        ),
        (
            {"soft_prompts_only": True, "embedding_position": "last_slice"},
            "`soft_prompts` would have no effect with `embedding_position='last_slice'`",
        ),
    ],
)
def test_prompts_without_effect_or_sense_are_refused(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        load(folder, **settings)


def test_prompts_are_refused_for_a_checkpoint_with_soft_prompts(folder, tmp_path):
    model, processor, _ = load(folder, soft_prompts=True)
    model.processor = processor
    model.save_pretrained(tmp_path / "soft")
    with pytest.raises(ValueError, match=r"soft has soft prompts.*`text_prompt` would have no effect"):
        load(tmp_path, "soft", text_prompt="In one word")


# The temperature.


def test_the_initial_temperature_is_where_training_starts(folder, tmp_path):
    model, processor, _ = load(folder, initial_temperature=0.2)
    assert model.embedding_head.inverse_temperature.item() == pytest.approx(5)
    model.processor = processor
    model.save_pretrained(tmp_path / "saved")
    assert load(tmp_path, "saved")[0].embedding_head.inverse_temperature.item() == pytest.approx(5)
    changed = load(tmp_path, "saved", initial_temperature=0.5)[0]
    assert changed.embedding_head.inverse_temperature.item() == pytest.approx(2)
    assert math.exp(changed.config.logit_scale_init_value) == pytest.approx(2)
    with pytest.raises(ValueError, match=r"`initial_temperature=0.001` is below 0.01, to which the model clamps"):
        load(folder, initial_temperature=0.001)
    with pytest.raises(ValueError, match=r"`initial_temperature=0.0` must be above 0"):
        load(folder, initial_temperature=0.0)


@pytest.mark.parametrize("adapter", [{}, {"use_peft": "true"}, {"soft_prompts_only": "true"}])
def test_a_frozen_temperature_stays_and_an_unfrozen_one_moves(folder, tmp_path, adapter):
    for frozen in (True, False):
        flags = {"initial_temperature": 0.25, "freeze_temperature": str(frozen), **adapter}
        model, _ = train(folder, tmp_path / f"frozen_{frozen}", **flags)
        temperature = 1 / model.embedding_head.inverse_temperature.item()
        assert (temperature == pytest.approx(0.25, rel=1e-6)) == frozen, temperature


def test_a_temperature_that_nothing_trains_needs_no_freezing(tmp_path):
    settings = {"contrastive_weight": 0, "freeze_temperature": True}
    with pytest.raises(ValueError, match=r"`freeze_temperature` would have no effect.*`contrastive_weight` is 0"):
        UniGDTrainingArguments(output_dir=str(tmp_path), **settings)


# Soft prompts without LoRA.


def trained_parameters(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("base", ["plain", "tied"])
@pytest.mark.parametrize("head_type", ["none", "mlp"])
def test_soft_prompts_alone_train_save_reload_merge_and_leave_the_rest_as_it_was(folder, tmp_path, base, head_type):
    head = {"head_type": head_type, **({"embedding_dim": 8} if head_type == "mlp" else {})}
    model, processor, peft_config = load(folder, base, soft_prompts_only=True, **head)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    args = make_args(tmp_path / "adapter", max_steps=3)
    trainer = UniGDTrainer(model, args, train_dataset=make_rows(), processing_class=processor, peft_config=peft_config)
    named = trained_parameters(trainer.model)
    assert any("trainable_tokens" in name for name in named) and any("logit_scale" in name for name in named)
    assert not any("lora" in name for name in named)
    assert len(named) == (2 if head_type == "none" else 6)
    trainer.train()
    trainer.save_model()
    soft = sorted(processor.soft_prompt_ids)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(tensor.numel() for name, tensor in saved.items() if "embedding_head" not in name) == len(soft) * 32
    batch = processor.process_sequences(SEQUENCES)
    expected = trainer.model.eval().get_base_model().embed(**batch)

    loaded, loaded_processor = load_checkpoint(str(tmp_path / "adapter"))
    assert torch.equal(loaded_processor.process_sequences(SEQUENCES)["input_ids"], batch["input_ids"])
    assert torch.equal(loaded.embed(**batch), expected)
    for name, tensor in loaded.vlm.state_dict().items():
        rows = torch.ones(len(tensor), dtype=torch.bool)
        if "embed_tokens" in name or (base == "tied" and "lm_head" in name):
            rows[soft] = False
            assert not torch.equal(tensor[soft], before[f"vlm.{name}"][soft]), name
        assert torch.equal(tensor[rows], before[f"vlm.{name}"][rows]), name

    main(["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")])
    merged, _ = load_checkpoint(str(tmp_path / "merged"))
    assert torch.equal(merged.embed(**batch), expected)
    model = UniGDForConditionalGeneration.from_vlm_pretrained(folder / base, **head)
    model.add_soft_prompts(**loaded_processor.soft_prompt_tokens)
    by_peft = PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert torch.equal(by_peft.get_base_model().eval().embed(**batch), expected)


def test_a_resumed_run_of_soft_prompts_ends_with_the_same_weights(folder, tmp_path):
    def make(output, **kwargs):
        model, processor, peft_config = load(folder, soft_prompts_only=True, head_type="linear", embedding_dim=8)
        args = make_args(output, max_steps=4, save_strategy="steps", save_steps=2, freeze_temperature=True, **kwargs)
        return UniGDTrainer(
            model, args, train_dataset=make_rows(), processing_class=processor, peft_config=peft_config
        )

    whole = make(tmp_path / "run")
    whole.train()
    resumed = make(tmp_path / "run")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    expected, found = whole.model.state_dict(), resumed.model.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    assert trained_parameters(resumed.model) == trained_parameters(whole.model)
    assert not any("logit_scale" in name for name in trained_parameters(resumed.model))


def test_a_lora_of_no_layers_adapts_no_layer(tmp_path):
    trainer = make_trainer(tmp_path, peft_config=LoraConfig(target_modules=[]), soft_prompts=True)
    assert not any("lora" in name for name in trained_parameters(trainer.model))
    with pytest.raises(ValueError, match=r"nothing but the temperature would be trained.*`soft_prompts_only`"):
        make_trainer(tmp_path, peft_config=LoraConfig(target_modules=[]))


def test_settings_of_trainable_tokens_name_the_remedy(tmp_path):
    with pytest.raises(
        ValueError, match=r"TrainableTokensConfig, which has no `modules_to_save`.*target_modules=\[\]"
    ):
        make_trainer(tmp_path, peft_config=TrainableTokensConfig(), soft_prompts=True)


def test_settings_of_lora_are_refused_beside_soft_prompts_alone():
    with pytest.raises(ValueError, match=r"trains without LoRA, so `lora_r`, `use_dora` would have no effect"):
        UniGDModelConfig(model_name_or_path="x", soft_prompts_only=True, lora_r=4, use_dora=True)


def test_the_card_says_that_there_is_no_lora(tmp_path):
    trainer = make_trainer(tmp_path, peft_config=LoraConfig(target_modules=[]), soft_prompts=True)
    trainer.create_model_card()
    assert "| LoRA | none |" in (tmp_path / "README.md").read_text()
