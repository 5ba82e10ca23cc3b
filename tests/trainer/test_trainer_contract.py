"""`UniGDTrainer` keeps the contract of Trainer: every method, parameter and argument is honoured or refused."""

import copy
import dataclasses
import inspect
import math
import socket

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState, PartialState
from datasets import DatasetDict
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import (
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_unigd import UniGDForConditionalGeneration, UniGDModel, UniGDProcessor
from hf_unigd.data import RowError
from hf_unigd.evaluation import retrieval_metrics
from hf_unigd.trainer import UniGDDataCollator, UniGDTrainer, UniGDTrainingArguments
from hf_unigd.trainer.arguments import UniGDModelConfig
from hf_unigd.trainer.loading import load_for_training
from tiny_models import make_vlm
from trainer_cases import make_args, make_rows, make_trainer


LORA = LoraConfig(r=4, lora_alpha=4, task_type="CAUSAL_LM")

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


# Forms of rows.


class TorchRows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, place):
        return self.rows[place]


@pytest.mark.parametrize("form", [lambda rows: rows, list, lambda rows: TorchRows(rows)])
def test_rows_train_and_evaluate_in_every_form(tmp_path, form):
    trainer = make_trainer(tmp_path, form(make_rows(8)), eval_rows=make_rows(8))
    trainer.train()
    expected = trainer.evaluate()
    given = trainer.evaluate(form(make_rows(8)))
    assert_same_metrics(expected, given)
    predicted = trainer.predict(form(make_rows(8)))
    assert predicted.metrics["test_loss"] == pytest.approx(expected["eval_loss"])
    assert predicted.predictions["anchors"].shape == (8, 32)
    with pytest.raises(RowError, match="Row 0 is a str"):
        trainer.evaluate(["a", "b"])


def assert_same_metrics(expected, given):
    timing = ("runtime", "per_second", "epoch")
    for name, value in expected.items():
        if not any(part in name for part in timing):
            assert given[name] == pytest.approx(value, rel=1e-5), name


def test_several_datasets_are_evaluated_and_predicted_by_name(tmp_path):
    parts = {"small": make_rows(4), "large": make_rows(8)}
    trainer = make_trainer(tmp_path, eval_rows=DatasetDict(parts))
    metrics = trainer.evaluate()
    assert {"eval_small_loss", "eval_large_loss"} <= metrics.keys()
    assert_same_metrics(metrics, trainer.evaluate(parts))
    predicted = trainer.predict(parts)
    assert predicted["small"].metrics["test_small_loss"] == pytest.approx(metrics["eval_small_loss"], rel=1e-5)
    assert len(predicted["large"].label_ids["rows"]) == 8


def test_evaluate_reads_the_given_rows_with_persistent_workers(tmp_path):
    trainer = make_trainer(
        tmp_path, eval_rows=make_rows(4), dataloader_num_workers=1, dataloader_persistent_workers=True
    )
    counts = [
        trainer.predict(make_rows(6)).label_ids["rows"].shape[0],
        trainer.evaluation_loop(trainer.get_eval_dataloader(), "evaluation").num_samples,
        trainer.evaluation_loop(trainer.get_eval_dataloader(make_rows(8)), "evaluation").num_samples,
    ]
    assert counts == [6, 4, 8]
    assert trainer.get_eval_dataloader() is trainer.get_eval_dataloader()
    trainer.eval_dataset = make_rows(2)
    assert trainer.evaluation_loop(trainer.get_eval_dataloader(), "evaluation").num_samples == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (DatasetDict(train=make_rows(4)), r"`train_dataset`: Rows come in the splits \['train'\]"),
        ("icons", "`train_dataset`: Rows must be a `datasets` dataset.*got str.*load_rows"),
        (3, "got int"),
    ],
)
def test_an_object_that_holds_no_rows_is_refused_by_name(tmp_path, rows, message):
    with pytest.raises(TypeError, match=message):
        make_trainer(tmp_path, rows)


# Evaluation of the objective.


def reference_eval_loss(model, processor, rows, block_size):
    """Returns the objective over blocks, with each row on its own, in plain torch."""
    contrastive, tokens_loss, tokens = [], 0.0, 0
    for start in range(0, len(rows), block_size):
        block = [rows[place] for place in range(start, min(start + block_size, len(rows)))]
        images, texts = [], []
        for row in block:
            batch = processor.process_sequences([[row["image"]]], [row["long_caption"]])
            backbone = model.vlm(**{name: value for name, value in batch.items() if name != "spans"})
            count = int((batch["labels"][:, 1:] != -100).sum())
            tokens_loss, tokens = tokens_loss + backbone.loss.item() * count, tokens + count
            images.append(model.embed(**batch))
            texts.append(model.embed(**processor.process_sequences([row["short_caption"]])))
        logits = torch.cat(images) @ torch.cat(texts).T / 0.07
        labels = torch.arange(len(block))
        both = [torch.nn.functional.cross_entropy(each, labels).item() for each in (logits, logits.T)]
        contrastive.append(sum(both) * len(block))
    return 0.5 * sum(contrastive) / len(rows) + 2.0 * tokens_loss / tokens


@torch.no_grad()
def test_eval_loss_is_the_objective_over_blocks_for_every_batch_size(tmp_path):
    weights = {"contrastive_weight": 0.5, "causal_lm_weight": 2.0, "eval_block_size": 4}
    rows = make_rows(10)
    for batch_size in (1, 3, 64):
        trainer = make_trainer(tmp_path, eval_rows=rows, per_device_eval_batch_size=batch_size, **weights)
        expected = reference_eval_loss(trainer.model.eval(), trainer.processing_class, rows, 4)
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
        weighted = 0.5 * metrics["eval_contrastive_loss"] + 2.0 * metrics["eval_causal_lm_loss"]
        assert metrics["eval_loss"] == pytest.approx(weighted)
        assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_causal_lm_loss"]))


def evaluate_on_rank(rank, port, folder):
    torch.set_num_threads(1)
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, str(value))
        trainer = make_trainer(folder, eval_rows=make_rows(10), eval_block_size=4, ddp_backend="gloo")
        assert trainer.args.world_size == 2
        metrics = trainer.evaluate()
        rows = trainer.predict(make_rows(10)).label_ids["rows"].tolist()
        if rank == 0:
            torch.save((metrics, rows), folder / "metrics.pt")
        torch.distributed.destroy_process_group()


def test_two_processes_report_the_metrics_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(evaluate_on_rank, (port, tmp_path), nprocs=2)
    metrics, rows = torch.load(tmp_path / "metrics.pt", weights_only=False)
    assert rows == list(range(10))
    assert_same_metrics(make_trainer(tmp_path, eval_rows=make_rows(10), eval_block_size=4).evaluate(), metrics)


def evaluating(**kwargs):
    return {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, **kwargs}


def test_eval_loss_finds_the_best_model_and_stops_training_early(tmp_path):
    trainer = make_trainer(
        tmp_path,
        eval_rows=make_rows(8),
        trainer_kwargs={"callbacks": [EarlyStoppingCallback(early_stopping_patience=2)]},
        **evaluating(max_steps=12, learning_rate=0.5, lr_scheduler_type="constant", load_best_model_at_end=True),
    )
    trainer.train()
    assert trainer.args.metric_for_best_model == "loss"
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) < 12 and trainer.state.best_metric == min(losses)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-4)


def test_reduce_lr_on_plateau_follows_eval_loss(tmp_path):
    trainer = make_trainer(
        tmp_path,
        eval_rows=make_rows(8),
        **evaluating(
            max_steps=4,
            lr_scheduler_type="reduce_lr_on_plateau",
            lr_scheduler_kwargs={"patience": 0, "threshold": 100.0, "threshold_mode": "abs"},
        ),
    )
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates[-1] < rates[0]


def test_prediction_loss_only_reports_only_losses_and_perplexity(tmp_path):
    trainer = make_trainer(tmp_path, eval_rows=make_rows(8), prediction_loss_only=True)
    metrics = trainer.evaluate()
    assert {"eval_loss", "eval_perplexity"} <= metrics.keys()
    assert not any("recall" in name for name in metrics)
    assert trainer.predict(make_rows(4)).predictions is None


def test_evaluation_keeps_the_order_of_rows_and_calls_on_prediction_step(tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
            seen.append(len(eval_dataloader))

    trainer = make_trainer(
        tmp_path,
        eval_rows=make_rows(8),
        eval_block_size=4,
        train_sampling_strategy="group_by_length",
        trainer_kwargs={"callbacks": [Watch]},
    )
    assert trainer.predict(make_rows(8)).label_ids["rows"].tolist() == list(range(8))
    assert seen == [2, 2]


def test_compute_metrics_gets_embeddings_keys_and_rankings(tmp_path):
    given = []

    def compute(prediction):
        given.append(prediction)
        return {"share": np.float64(0.25), "perplexity": torch.tensor(7.0)}

    rows = make_rows(6, short_caption=["a", "b", "c", "a", "d", "e"])
    trainer = make_trainer(tmp_path, eval_rows=rows, trainer_kwargs={"compute_metrics": compute})
    metrics = trainer.evaluate()
    assert metrics["eval_share"] == 0.25 and metrics["eval_perplexity"] == 7.0
    predictions, labels = given[0]
    anchors, positives = (torch.tensor(predictions[name]) for name in ("anchors", "positives"))
    torch.testing.assert_close(anchors.norm(dim=1), torch.ones(6))
    assert labels["rows"].tolist() == list(range(6))
    assert labels["positive_keys"][0] == labels["positive_keys"][3]
    similarity = anchors @ positives[:3].T  # the fourth caption equals the first one
    best = predictions["anchor_to_positive"]
    assert best.shape == (6, 5) and 3 not in best
    others = anchors @ positives[[0, 1, 2, 4, 5]].T
    assert best[:, 0].tolist() == [[0, 1, 2, 4, 5][place] for place in others.argmax(1).tolist()]
    assert similarity.shape == (6, 3)
    keys = (torch.tensor(labels[name]) for name in ("anchor_keys", "positive_keys"))
    for name, value in retrieval_metrics(anchors, positives, *keys).items():
        assert metrics[f"eval_{name}"] == value
    assert trainer.predict(rows, ignore_keys=["anchors"]).predictions.keys() == predictions.keys() - {"anchors"}


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


# Other kinds of models, processors and arguments.


def make_model(**kwargs):
    tiny = make_vlm()
    return UniGDForConditionalGeneration.from_vlm(tiny.model, **kwargs), UniGDProcessor(tiny.processor)


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
