"""`UniGDTrainer` keeps the contract of Trainer: every method, parameter and argument is honoured or refused."""

import dataclasses
import inspect

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from transformers import (
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from hf_unigd.trainer import UniGDDataCollator, UniGDTrainer
from tiny_models import make_vlm
from trainer_cases import LORA, make_args, make_model, make_rows, make_trainer


# Every field of `TrainingArguments` is in one of three tables. Trainer handles these, unchanged:
TRAINERS_OWN = """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    optim_target_modules gradient_accumulation_steps max_grad_norm bf16 fp16 tf32 activation_checkpointing
    activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs torch_compile
    torch_compile_backend torch_compile_mode neftune_noise_alpha torch_empty_cache_steps logging_strategy
    logging_steps logging_first_step log_on_each_node log_level log_level_replica disable_tqdm report_to
    run_name project trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps
    eval_delay eval_on_start save_only_model save_strategy save_steps save_on_each_node save_total_limit
    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip
    restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu dataloader_pin_memory
    ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed
    debug skip_memory_metrics resume_from_checkpoint local_rank do_train do_eval do_predict
"""
# UniGDTrainer handles these itself:
HANDLED = {
    "accelerator_config": "all but what would split batches",
    "auto_find_batch_size": "stops where a batch has no negatives",
    "dataloader_drop_last": "for training batches; evaluation covers every row",
    "dataloader_in_order": "in every loader",
    "dataloader_multiprocessing_context": "in every loader",
    "dataloader_num_workers": "in every loader",
    "dataloader_persistent_workers": "in every loader, but refused with positions that change in each epoch",
    "dataloader_prefetch_factor": "in every loader",
    "ddp_find_unused_parameters": "defaults to True if the vision tower is trained",
    "eval_use_gather_object": "results are always gathered as objects",
    "include_num_input_tokens_seen": "counts the tokens of all chunks",
    "label_smoothing_factor": "in the next-token loss, in training only",
    "logging_nan_inf_filter": "a loss that is not finite stops the run before it could be filtered",
    "parallelism_config": "data parallelism only",
    "per_device_eval_batch_size": "rows per forward pass of a block",
    "prediction_loss_only": "leaves out retrieval and predictions",
    "train_sampling_strategy": "all but `batch_rebalance`",
}
# These would have no effect, so this value of each is refused:
REFUSED = {
    "average_tokens_across_devices": False,
    "batch_eval_metrics": True,
    "bf16_full_eval": True,
    "enable_jit_checkpoint": True,
    "eval_accumulation_steps": 2,
    "eval_do_concat_batches": False,
    "fp16_full_eval": True,
    "include_for_metrics": ["inputs"],
    "label_names": ["labels"],
    "length_column_name": "size",
    "liger_kernel_config": {"rope": True},
    "remove_unused_columns": True,
    "use_cache": True,
    "use_liger_kernel": True,
}
PARAMETERS = {
    "model": "honoured",
    "args": "honoured",
    "data_collator": "honoured",
    "train_dataset": "honoured",
    "eval_dataset": "honoured",
    "processing_class": "honoured",
    "model_init": "honoured",
    "compute_loss_func": "refused",
    "compute_metrics": "honoured",
    "callbacks": "honoured",
    "optimizers": "honoured",
    "optimizer_cls_and_kwargs": "honoured",
    "preprocess_logits_for_metrics": "refused",
}


def test_every_argument_is_honoured_or_refused():
    names = [*TRAINERS_OWN.split(), *HANDLED, *REFUSED]
    assert len(names) == len(set(names))
    assert set(names) >= {field.name for field in dataclasses.fields(TrainingArguments)}


@pytest.mark.parametrize("name", REFUSED)
def test_an_argument_without_effect_is_refused_with_the_reason(tmp_path, name):
    with pytest.raises(ValueError, match=rf"`{name}=.*would have no effect: .*default"):
        make_args(tmp_path, **{name: REFUSED[name]})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"train_sampling_strategy": "batch_rebalance"}, "batch_rebalance"),
        ({"accelerator_config": {"split_batches": True}}, "`split_batches` of `accelerator_config`"),
        ({"accelerator_config": {"dispatch_batches": True}}, "`dispatch_batches` of `accelerator_config`"),
        ({"eval_block_size": 1}, "eval_block_size=1"),
    ],
)
def test_settings_that_would_split_batches_are_refused(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_args(tmp_path, **kwargs)


def test_the_constructor_has_the_parameters_of_trainer_in_the_same_order():
    ours = list(inspect.signature(UniGDTrainer.__init__).parameters)
    theirs = list(inspect.signature(Trainer.__init__).parameters)
    assert ours == [*theirs, "peft_config"]
    assert set(PARAMETERS) == set(theirs) - {"self"}


@pytest.mark.parametrize("name", [name for name, answer in PARAMETERS.items() if answer == "refused"])
def test_a_function_that_would_never_be_called_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"`{name}` is not supported"):
        make_trainer(tmp_path, trainer_kwargs={name: lambda *args, **kwargs: None})


# Collators.


def test_the_users_own_collator_is_used(tmp_path):
    calls = []

    class Counting(UniGDDataCollator):
        def __call__(self, examples):
            calls.append((self.chunk_size, self.contrastive))
            return super().__call__(examples)

    processor = UniGDProcessor(make_vlm().processor)
    trainer = make_trainer(
        tmp_path,
        eval_rows=make_rows(4),
        gradient_cache_chunk_size=2,
        contrastive_weight=0.0,
        trainer_kwargs={"data_collator": Counting(processor)},
    )
    trainer.train()
    assert calls and set(calls) == {(2, False)}
    trainer.evaluate()
    assert calls[-1] == (4, True)

    class Hooked(UniGDTrainer):
        def get_data_collator(self, args, processing_class):
            return Counting(processing_class)

        def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
            names.append(dataset_name)
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

    names = []
    model = UniGDForConditionalGeneration.from_vlm(make_vlm().model)
    hooked = Hooked(model, make_args(tmp_path), None, make_rows(), {"a": make_rows(4)}, processor)
    assert isinstance(hooked.data_collator, Counting)
    hooked.predict(make_rows(4))
    assert names == ["train", "eval_a", "test"]


@pytest.mark.parametrize(
    ("collator", "error", "message"),
    [
        (DataCollatorWithPadding(None), TypeError, "must be a UniGDDataCollator, got DataCollatorWithPadding"),
        (UniGDDataCollator(None, max_length=9), ValueError, "`max_length` is 60 in `args` and 9 in `data_collator`"),
    ],
)
def test_a_foreign_collator_is_refused_at_construction(tmp_path, collator, error, message):
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, max_length=60, trainer_kwargs={"data_collator": collator})


# Arguments that UniGDTrainer handles itself.


def test_label_smoothing_applies_to_the_next_token_loss_in_training(tmp_path):
    trainer = make_trainer(tmp_path, contrastive_weight=0.0, label_smoothing_factor=0.25)
    batch = trainer.data_collator([trainer.train_dataset[place] for place in range(4)])
    count = trainer._get_num_items_in_batch([batch], "cpu")
    loss = trainer.compute_loss(trainer.model.train(), batch, num_items_in_batch=count)
    (anchors,) = batch["chunks"]
    inputs = {name: value for name, value in anchors.items() if name not in ("spans", "labels")}
    outputs = trainer.model.vlm(**inputs)
    expected = trainer.label_smoother(outputs, anchors["labels"], shift_labels=True)  # transformers' own
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("counted", ["all", "non_padding"])
def test_tokens_and_operations_are_counted(tmp_path, counted):
    rows = make_rows(8, long_caption=["A cat." + " on the grass" * place for place in range(8)])
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 1}
    trainer = make_trainer(tmp_path, rows, include_num_input_tokens_seen=counted, **settings)
    batches = [list(batch["chunks"]) for batch in trainer.get_train_dataloader()]
    name = "input_ids" if counted == "all" else "attention_mask"
    tokens = sum(chunk[name].numel() if counted == "all" else chunk[name].sum() for part in batches for chunk in part)
    trainer.train()
    if counted == "non_padding":  # the amount of padding depends on which rows share a batch
        assert trainer.state.num_input_tokens_seen == tokens
    assert trainer.state.num_input_tokens_seen > 0
    assert trainer.state.total_flos > 0


def test_model_init_makes_the_model_of_every_training(tmp_path):
    made = []

    def make():
        made.append(UniGDForConditionalGeneration.from_vlm(make_vlm(seed=len(made)).model))
        return made[-1]

    processor = UniGDProcessor(make_vlm().processor)
    settings = {"model_init": make, "train_dataset": make_rows(), "args": make_args(tmp_path, max_steps=1)}
    trainer = UniGDTrainer(processing_class=processor, peft_config=LORA, **settings)
    trainer.train()
    assert len(made) == 2 and trainer.model.get_base_model() is made[1]
    assert made[1].processor is processor
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert any("lora_" in name for name in trained) and not any("vision_tower" in name for name in trained)
    with pytest.raises(ValueError, match="`model_init` needs `processing_class`"):
        UniGDTrainer(**settings)


def test_each_model_of_model_init_has_image_features_of_its_own(tmp_path):
    seeds = iter(range(9))
    trainer = UniGDTrainer(
        model_init=lambda: UniGDForConditionalGeneration.from_vlm(make_vlm(seed=next(seeds)).model),
        args=make_args(tmp_path / "out", max_steps=1, vision_cache=str(tmp_path / "cache")),
        train_dataset=make_rows(),
        processing_class=UniGDProcessor(make_vlm().processor),
    )
    trainer.train()
    trainer.train()
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_an_evaluation_dataset_may_be_named_train(tmp_path):
    """It is prepared as an evaluation dataset: without the lengths that sorting the training rows needs."""
    settings = {"train_sampling_strategy": "group_by_length"}
    stream = make_rows(8).to_iterable_dataset()  # whose rows cannot be sorted
    trainer = make_trainer(tmp_path, eval_rows={"train": stream}, **settings)
    assert trainer.evaluate()["eval_train_loss"] > 0


def test_neftune_changes_the_loss_and_torch_compile_does_not(tmp_path):
    losses = []
    for kwargs in ({}, {"neftune_noise_alpha": 50.0}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        trainer = make_trainer(tmp_path, max_steps=1, **kwargs)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
        AcceleratorState._reset_state(True)
        PartialState._reset_state()
    assert losses[1] != pytest.approx(losses[0], rel=1e-3)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


def test_the_batch_size_is_not_halved_to_a_batch_without_negatives(tmp_path):
    trainer = make_trainer(tmp_path, auto_find_batch_size=True)

    def no_memory(*args, **kwargs):
        sizes.append(trainer._train_batch_size)
        raise RuntimeError("CUDA out of memory.")

    sizes = []
    trainer.training_step = no_memory
    with pytest.raises(ValueError, match="A batch of one row has no negatives"):
        trainer.train()
    assert sizes[0] == 4 and sizes[-1] == 2


def test_several_gpus_in_one_process_are_refused(tmp_path):
    args = make_args(tmp_path)
    args._n_gpu = 2
    model, processor = make_model()
    with pytest.raises(ValueError, match="2 GPUs in one process"):
        UniGDTrainer(model, args, train_dataset=make_rows(), processing_class=processor)


def test_saving_a_checkpoint_does_not_change_verify_saves(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2)
    trainer.model.verify_saves = False
    trainer.train()
    assert trainer.model.verify_saves is False


# Documentation.


def test_the_example_of_the_class_docstring_runs(tmp_path, monkeypatch):
    example = inspect.getdoc(UniGDTrainer).split("```python\n")[1].split("```")[0]
    tiny = make_vlm()
    tiny.model.save_pretrained(tmp_path / "llava")
    tiny.processor.save_pretrained(tmp_path / "llava")
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: make_rows(32))
    monkeypatch.chdir(tmp_path)
    run = example.replace("llava-hf/llava-1.5-7b-hf", str(tmp_path / "llava"))
    namespace = {}
    exec(run.replace('output_dir="vladva"', 'output_dir="vladva", max_steps=1, use_cpu=True'), namespace)
    assert namespace["trainer"].state.global_step == 1
