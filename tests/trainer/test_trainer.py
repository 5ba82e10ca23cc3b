"""The trainer on a tiny LLaVA: the objective, the trained parameters, logs, checkpoints and resuming."""

import copy
import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from hf_unigd.data import RowError, RowParser
from hf_unigd.hub import load_checkpoint
from hf_unigd.trainer import UniGDDataCollator, UniGDTrainer
from hf_unigd.trainer.callbacks import WarnOfPlateau
from tiny_models import make_image, make_vlm
from tiny_teachers import save_teachers
from trainer_cases import make_args, make_rows, make_trainer


LORA = LoraConfig(r=16, lora_alpha=16, task_type="CAUSAL_LM")


def test_the_loss_is_the_weighted_sum_of_infonce_and_next_token(tmp_path):
    trainer = make_trainer(tmp_path, contrastive_weight=0.5, causal_lm_weight=2.0)
    batch = trainer.data_collator([trainer.train_dataset[place] for place in range(4)])
    model = trainer.model
    loss = trainer.compute_loss(model, batch, num_items_in_batch=trainer._get_num_items_in_batch([batch], "cpu"))

    anchors, candidates = batch["chunks"]
    backbone = model.vlm(**{name: value for name, value in anchors.items() if name != "spans"})
    images, texts = model.embed(**anchors), model.embed(**candidates)
    logits = images @ texts.T / 0.07
    labels = torch.arange(4)
    contrastive = torch.nn.functional.cross_entropy(logits, labels) + torch.nn.functional.cross_entropy(
        logits.T, labels
    )
    torch.testing.assert_close(loss, 0.5 * contrastive + 2.0 * backbone.loss, rtol=1e-5, atol=1e-5)


def test_each_row_runs_once_and_only_labelled_positions_go_through_the_lm_head(tmp_path):
    trainer = make_trainer(tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[place] for place in range(4)])
    rows, positions, images = [], [], []
    model = trainer.model
    model.vlm.model.language_model.register_forward_hook(
        lambda _module, _args, output: rows.append(output.last_hidden_state.shape[0])
    )
    model.vlm.model.vision_tower.register_forward_hook(
        lambda _module, args, _output: images.append(args[0].shape[0]), with_kwargs=False
    )
    model.vlm.lm_head.register_forward_hook(
        lambda _module, args, _output: positions.append(args[0].shape[:-1].numel())
    )
    trainer.compute_loss(model.train(), batch, num_items_in_batch=1)
    assert rows == [4, 4]  # the images with their captions, then the texts
    assert images == [4]
    assert positions == [int((batch["chunks"][0]["labels"] != -100).sum()), 0]


def test_four_accumulation_steps_normalise_by_the_tokens_of_all_steps(tmp_path):
    """The next-token gradient of four steps of 2 rows with unequal captions is that of one batch of 8."""
    rows = make_rows(8, long_caption=["A cat." + " on the grass" * place for place in range(8)])
    gradients = []
    for steps in (1, 4):
        trainer = make_trainer(
            tmp_path,
            rows,
            contrastive_weight=0.0,
            gradient_accumulation_steps=steps,
            per_device_train_batch_size=8 // steps,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
        )
        before = copy.deepcopy(trainer.model.state_dict())
        trainer.train()
        gradients.append(
            torch.cat([(before[name] - tensor).flatten() for name, tensor in trainer.model.state_dict().items()])
        )
    assert gradients[0].norm() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("family", "adapter"), [("llava", True), ("qwen2_vl", False)])
def test_training_learns_the_captions_and_the_pairs(tmp_path, family, adapter):
    rows = make_rows(8)
    trainer = make_trainer(
        tmp_path, rows, family, LORA if adapter else None, adapter, rows, max_steps=90, per_device_train_batch_size=8
    )
    before, _, after = trainer.evaluate(), trainer.train(), trainer.evaluate()
    assert after["eval_perplexity"] < before["eval_perplexity"] * (
        0.9 if adapter else 0.25
    )  # the frozen language model is random
    assert after["eval_anchor_to_positive_recall_at_1"] >= 0.75 > before["eval_anchor_to_positive_recall_at_1"]
    assert after["eval_positive_to_anchor_recall_at_1"] >= 0.75


def test_every_loss_is_logged_separately(tmp_path):
    trainer = make_trainer(tmp_path, loss_gradient_norm_steps=2, gradient_accumulation_steps=2)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in logs:
        assert entry["loss"] == pytest.approx(entry["contrastive_loss"] + entry["causal_lm_loss"], rel=1e-4)
        assert entry["temperature"] == pytest.approx(0.07, rel=0.1)
        assert -1 <= entry["negative_similarity"] <= entry["positive_similarity"] + 1
        assert entry["masked_fraction"] == 0
    assert ["contrastive_gradient_norm" in entry for entry in logs] == [True, False, True, False]
    assert all(entry["causal_lm_gradient_norm"] > 0 for entry in logs[::2])


def test_the_logged_gradient_norm_is_the_norm_of_the_gradient(tmp_path):
    trainer = make_trainer(tmp_path, causal_lm_weight=0.0, loss_gradient_norm_steps=1, max_steps=1)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["contrastive_gradient_norm"] == pytest.approx(entry["grad_norm"], rel=1e-4)


def test_only_the_parameters_that_the_arguments_name_are_trained(tmp_path):
    def trained(trainer):
        return {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}

    full = trained(make_trainer(tmp_path))
    assert not any("vision_tower" in name or "projector" in name for name in full)
    assert any("language_model" in name for name in full) and "embedding_head.logit_scale" in full
    assert any("vision_tower" in name for name in trained(make_trainer(tmp_path, freeze_vision_tower=False)))

    adapter = trained(make_trainer(tmp_path, peft_config=LORA, soft_prompts=True))
    kinds = {"lora", "trainable_tokens", "modules_to_save"}
    assert all(any(kind in name for kind in kinds) for name in adapter)
    assert not any("vision_tower" in name for name in adapter)
    leaves = {name.split(".lora_")[0].rpartition(".")[2] for name in adapter if "lora_" in name}
    assert leaves == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    only = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    some = trained(make_trainer(tmp_path, peft_config=only))
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in some if "lora_" in name} == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match="'w_proj'"):
        make_trainer(tmp_path, peft_config=LoraConfig(target_modules=["w_proj"]))


def test_the_temperature_is_clamped_and_has_no_weight_decay(tmp_path):
    trainer = make_trainer(tmp_path, weight_decay=0.5, learning_rate=1.0, max_steps=2)
    decayed = trainer.get_decay_parameter_names(trainer.model)
    assert "embedding_head.logit_scale" not in decayed
    assert any(name.endswith("q_proj.weight") for name in decayed)
    trainer.model.embedding_head.logit_scale.data.fill_(10.0)
    trainer.train()
    assert trainer.model.embedding_head.logit_scale.exp().item() <= 100.001


@pytest.mark.parametrize("adapter", [False, True])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_run(tmp_path, adapter):
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "dataloader_num_workers": 0}
    peft_config = LoraConfig(r=4, lora_alpha=4, lora_dropout=0.1, task_type="CAUSAL_LM") if adapter else None
    whole = make_trainer(tmp_path / "whole", peft_config=peft_config, soft_prompts=adapter, **settings)
    whole.train()
    interrupted = make_trainer(tmp_path / "parts", peft_config=peft_config, soft_prompts=adapter, **settings)

    class StopError(Exception):
        pass

    step = interrupted.training_step

    def stop_after_four(*args, **kwargs):
        if interrupted.state.global_step == 4:
            raise StopError
        return step(*args, **kwargs)

    interrupted.training_step = stop_after_four
    with pytest.raises(StopError):
        interrupted.train()
    resumed = make_trainer(tmp_path / "parts", peft_config=peft_config, soft_prompts=adapter, **settings)
    resumed.train(resume_from_checkpoint=True)
    for (name, expected), tensor in zip(
        whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(expected, tensor), name


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_an_adapter_loads_on_its_base_model_with_the_same_embeddings(tmp_path, family):
    tiny = make_vlm(family)
    tiny.model.save_pretrained(tmp_path / "base")
    tiny.processor.save_pretrained(tmp_path / "base")
    model = UniGDForConditionalGeneration.from_vlm_pretrained(tmp_path / "base", head_type="linear", embedding_dim=8)
    processor = UniGDProcessor.from_vlm_pretrained(tmp_path / "base")
    model.add_soft_prompts(**processor.add_soft_prompts())
    args = make_args(tmp_path / "adapter", max_steps=3)
    trainer = UniGDTrainer(model, args, train_dataset=make_rows(), processing_class=processor, peft_config=LORA)
    trainer.train()
    trainer.save_model()
    assert isinstance(trainer.model, PeftModel)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {"logit_scale", "weight"} <= {name.rpartition(".")[2] for name in saved if "embedding_head" in name}
    assert any("trainable_tokens" in name for name in saved)

    loaded, loaded_processor = load_checkpoint(str(tmp_path / "adapter"))
    batch = loaded_processor.process_sequences(["a red cat", [make_image(1)]])
    trainer.model.eval()
    torch.testing.assert_close(loaded.embed(**batch), trainer.model.embed(**batch), atol=1e-5, rtol=0)
    assert set(processor.soft_prompt_ids) <= set(loaded.generation_config.suppress_tokens)


def test_rows_of_every_kind_mix_in_one_batch(tmp_path):
    image, text = {"type": "image"}, {"type": "text", "text": "What is it?"}
    chat = [
        {"role": "user", "content": [image, text]},
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
    ]
    parser = RowParser(lambda text: len(text.split()), trust_caption_columns=True)
    rows = [
        {"image": make_image(0), "short_caption": "a red cat", "long_caption": "A red cat on the grass."},
        {"image": make_image(1), "short_caption": "a blue dog"},
        {"image": make_image(2), "long_caption": "A green car."},
        {"anchor": "a question", "positive": ["see", make_image(3)], "negative": "not that"},
        {"messages": chat, "images": [make_image(4)]},
        {
            "messages": [{"role": "user", "content": "two"}],
            "positive_messages": [[{"role": "user", "content": "three"}]],
        },
    ]
    trainer = make_trainer(tmp_path)
    batch = trainer.data_collator([parser(row, place) for place, row in enumerate(rows)])
    anchors, candidates = batch["chunks"]
    assert anchors["spans"][:, 0].tolist() == [0, 1, 3, 5]
    assert len(candidates["spans"]) == 5
    labelled = (anchors["labels"] != -100).any(1).tolist()
    assert labelled == [True, False, True, False, True, False]
    loss = trainer.compute_loss(trainer.model.train(), batch, num_items_in_batch=9)
    loss.backward()
    assert torch.isfinite(loss)


@pytest.mark.parametrize("missing", ["short_caption", "long_caption"])
def test_rows_with_only_one_kind_of_caption_train(tmp_path, missing):
    trainer = make_trainer(tmp_path, make_rows().remove_columns(missing))
    trainer.train()
    entry = trainer.state.log_history[0]
    assert (entry["contrastive_loss"] == 0) == (missing == "short_caption")
    assert (entry["causal_lm_loss"] == 0) == (missing == "long_caption")


def test_streaming_rows_train(tmp_path):
    trainer = make_trainer(tmp_path, make_rows().to_iterable_dataset(), eval_rows=make_rows(8))
    trainer.train()
    assert trainer.state.global_step == 4
    assert "eval_perplexity" in trainer.evaluate()


def test_evaluation_covers_every_row_of_an_incomplete_last_batch(tmp_path):
    trainer = make_trainer(tmp_path, eval_rows=make_rows(6))
    assert trainer.args.dataloader_drop_last
    assert trainer.evaluation_loop(trainer.get_eval_dataloader(), "evaluation").num_samples == 6


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    trainer = make_trainer(
        tmp_path,
        eval_rows=make_rows(8),
        max_steps=2,
        learning_rate=0.5,  # so high that the second step makes the model worse
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="perplexity",
        greater_is_better=False,
    )
    trainer.train()
    best = trainer.state.best_metric
    assert trainer.evaluate()["eval_perplexity"] == pytest.approx(best, rel=1e-4)


def test_gradient_checkpointing_does_not_change_the_losses(tmp_path):
    losses = []
    for checkpointing in (False, True):
        trainer = make_trainer(tmp_path, peft_config=LORA, soft_prompts=True, gradient_checkpointing=checkpointing)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_non_finite_loss_stops_the_run_after_saving_a_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=6)
    step = trainer.training_step

    def poison(model, inputs, *args):
        if trainer.state.global_step == 2:
            inputs["chunks"][0]["pixel_values"][0] = torch.nan
            trainer.poisoned = inputs["rows"].tolist()
        return step(model, inputs, *args)

    trainer.training_step = poison
    with pytest.raises(FloatingPointError, match="not finite at step 2") as error:
        trainer.train()
    assert str(trainer.poisoned) in str(error.value)
    saved = tmp_path / "checkpoint-2"
    assert all(torch.isfinite(tensor).all() for tensor in load_file(saved / "model.safetensors").values())
    state = json.loads((saved / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    resumed = make_trainer(tmp_path, max_steps=6)
    resumed.train(resume_from_checkpoint=str(saved))
    assert resumed.state.global_step == 6


@pytest.mark.parametrize(
    ("rows", "kwargs", "message"),
    [
        (16, {"per_device_train_batch_size": 1}, "no negatives"),
        (3, {}, "3 rows are fewer than a batch of 4"),
        (5, {"dataloader_drop_last": False}, "a batch of its own"),
    ],
)
def test_batches_that_cannot_train_are_refused_before_training(tmp_path, rows, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, make_rows(rows), **kwargs)


def test_a_batch_of_one_trains_without_the_contrastive_loss(tmp_path):
    make_trainer(tmp_path, per_device_train_batch_size=1, contrastive_weight=0.0).train()


@pytest.mark.parametrize(("learning_rate", "warnings"), [(0.0, 1), (1e-2, 0)])
def test_a_contrastive_loss_that_stays_at_chance_is_reported_once(
    tmp_path, caplog, monkeypatch, learning_rate, warnings
):
    monkeypatch.setattr(WarnOfPlateau, "patience", 25)
    settings = {"causal_lm_weight": 0.0, "freeze_vision_tower": False, "learning_rate": learning_rate}
    trainer = make_trainer(tmp_path, make_rows(8), max_steps=60, per_device_train_batch_size=8, **settings)
    with caplog.at_level("WARNING", logger="hf_unigd"):
        trainer.train()
    assert caplog.text.count("has not left the level of chance") == warnings


def test_bad_rows_are_refused_or_skipped_before_training(tmp_path, caplog):
    rows = make_rows(short_caption=["a cat"] * 3 + [""] + ["a dog"] * 12)
    with pytest.raises(RowError, match="Row 3 has an empty `short_caption`"):
        make_trainer(tmp_path, rows)
    trainer = make_trainer(tmp_path, rows, skip_bad_rows=True)
    assert len(trainer.train_dataset) == 15
    assert "Skipped 1 of 16 rows." in caplog.text


def test_bad_rows_are_skipped_during_training_without_check_rows(tmp_path, caplog):
    rows = make_rows(8, short_caption=["a cat"] * 3 + [""] + ["a dog"] * 3 + ["a dog " * 40])
    settings = {"check_rows": "off", "max_length": 60, "per_device_train_batch_size": 8, "max_steps": 1}
    trainer = make_trainer(tmp_path, rows, skip_bad_rows=True, **settings)
    batch = trainer.data_collator([trainer.train_dataset[place] for place in range(8)])
    assert batch["rows"].tolist() == [0, 1, 2, 4, 5, 6]
    assert [len(chunk["input_ids"]) for chunk in batch["chunks"]] == [6, 6]
    assert "Row 3 has an empty" in caplog.text and "Row 7 has" in caplog.text
    trainer.train()
    with pytest.raises(RowError, match="Row 3 has an empty"):
        make_trainer(tmp_path, rows, **settings).train()


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_cache_chunk_size": 1}, {"negatives_across_accumulation": True}, {"alignment_weight": 1.0}],
)
def test_a_batch_of_bad_rows_alone_changes_nothing(tmp_path, settings):
    settings = {"check_rows": "off", "train_sampling_strategy": "sequential", **settings}
    if "alignment_weight" in settings:
        settings |= vars(save_teachers(tmp_path / "teachers"))
    rows = make_rows(6, short_caption=["a cat", "a dog", "", "", "a red cat", "a red dog"])
    accumulation = 3 if "negatives_across_accumulation" in settings else 1
    settings |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation}
    trainer = make_trainer(tmp_path, rows, skip_bad_rows=True, max_steps=3 // accumulation, **settings)
    batch = trainer.data_collator([trainer.train_dataset[2], trainer.train_dataset[3]])
    assert not len(batch["rows"])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(map(math.isfinite, losses))
    assert [loss > 0 for loss in losses] == ([True, False, True] if accumulation == 1 else [True])


@pytest.mark.parametrize("check_rows", ["text", "off"])
def test_an_error_names_the_row_that_is_longer_than_max_length(tmp_path, check_rows):
    with pytest.raises(RowError, match=r"Row \d+ has \d+ tokens.*max_length=20"):
        make_trainer(tmp_path, max_length=20, check_rows=check_rows).train()


def test_no_row_is_longer_than_the_context_of_the_model(tmp_path):
    with pytest.raises(RowError, match=r"Row 1 has \d+ tokens"):
        make_trainer(tmp_path, make_rows(4, long_caption=["a", "red " * 1200, "a", "a"]), long_caption_max_tokens=5000)
    with pytest.raises(ValueError, match="`max_length=5000` is more than the 1024 tokens of the model's context"):
        make_trainer(tmp_path, max_length=5000)
    processor = UniGDProcessor(make_vlm().processor)
    trainer = UniGDTrainer(
        args=make_args(tmp_path),
        train_dataset=make_rows(),
        processing_class=processor,
        model_init=lambda: UniGDForConditionalGeneration.from_vlm(make_vlm().model),
    )
    assert trainer.data_collator.max_length == 1024


def test_the_check_measures_targets_that_only_the_structure_loss_reads(tmp_path):
    rows = make_rows(4, long_caption=["a", "red " * 60, "a", "a"])
    settings = {"max_length": 60, "contrastive_weight": 0.0, "causal_lm_weight": 0.0, "alignment_weight": 1.0}
    with pytest.raises(RowError, match=r"Row 1 has \d+ tokens"):
        make_trainer(tmp_path, rows, **settings, **vars(save_teachers(tmp_path / "teachers")))


@pytest.mark.parametrize(("given", "kept"), [("true", True), ("True", True), ("out/checkpoint-2", "out/checkpoint-2")])
def test_the_flag_that_resumes_may_be_true_or_a_folder(tmp_path, given, kept):
    assert make_args(tmp_path, resume_from_checkpoint=given).resume_from_checkpoint == kept


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="causal_lm_weight=-1"):
        make_args(tmp_path, causal_lm_weight=-1)
    with pytest.raises(ValueError, match="Every loss weight is 0"):
        make_args(tmp_path, causal_lm_weight=0, contrastive_weight=0)
    with pytest.raises(ValueError, match="remove_unused_columns"):
        make_args(tmp_path, remove_unused_columns=True)
    tiny = make_vlm()
    with pytest.raises(ValueError, match="UniGDProcessor, got LlavaProcessor"):
        UniGDTrainer(
            UniGDForConditionalGeneration.from_vlm(tiny.model), make_args(tmp_path), processing_class=tiny.processor
        )


def test_the_precision_of_the_launcher_is_used_unless_a_flag_is_set(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert make_args(tmp_path).bf16 and make_args(tmp_path, bf16=None).bf16
    args = make_args(tmp_path, fp16=True)
    assert args.fp16 and not args.bf16


def test_the_collator_gives_duplicates_equal_keys():
    tiny = make_vlm()
    parser = RowParser(lambda text: len(text.split()))
    rows = [
        {"image": make_image(seed), "caption": caption} for seed, caption in ((1, "a"), (2, "b"), (1, "c"), (3, "b"))
    ]
    batch = UniGDDataCollator(UniGDProcessor(tiny.processor))([parser(row, place) for place, row in enumerate(rows)])
    images, captions = batch["anchor_keys"].tolist(), batch["positive_keys"].tolist()
    assert images[0] == images[2] and len(set(images)) == 3
    assert captions[1] == captions[3] and len(set(captions)) == 3


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_no_caption_of_an_image_is_its_negative(tmp_path, chunk_size):
    """Captions of its list that were not drawn, its long caption, and those of another row with the image."""
    rows = [
        {"image": make_image(1), "short_caption": ["a red cat", "a cat"], "long_caption": "A red cat on the grass."},
        {"image": make_image(2), "short_caption": "two dogs", "negatives": ["a red cat", "a cat", "a car"]},
        {"image": make_image(1), "long_caption": "Three people."},
        {"image": make_image(3), "short_caption": "a car", "negatives": ["A red cat on the grass.", "Three people."]},
    ]
    trainer = make_trainer(tmp_path, rows, gradient_cache_chunk_size=chunk_size, dataloader_drop_last=False)
    batch = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        embeddings = torch.cat([trainer.model.embed(**chunk) for chunk in inputs_of(batch) if len(chunk["spans"])])
        _, metrics = trainer.batch_losses(embeddings, torch.tensor(2.0), batch)
    # Of 3 queries with 3 positives and 5 negatives: 4 negatives for image 1, and "a car" for image 3.
    assert metrics["masked_fraction"].item() == pytest.approx(5 / (3 * 8 - 3))


def inputs_of(batch):
    return [{name: value for name, value in chunk.items() if name != "labels"} for chunk in batch["chunks"]]


def test_autocast_ends_with_the_step(tmp_path):
    """Otherwise, later computations such as the probe of a checkpoint would run in another precision."""
    trainer = make_trainer(tmp_path, bf16=True, save_strategy="steps", save_steps=4)
    trainer.train()
    assert not torch.is_autocast_enabled("cpu")
    UniGDForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-4")
