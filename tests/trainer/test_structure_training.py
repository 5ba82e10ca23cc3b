"""Training with Sugar's structure loss, alone and with the other losses."""

import pytest
import torch
from datasets import Dataset

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from hf_unigd.bulk import write_slice_features
from hf_unigd.data import ExampleDataset, RowParser, SentenceSplitter, Teachers
from hf_unigd.data.teachers import slice_columns
from hf_unigd.trainer import UniGDTrainer, UniGDTrainingArguments
from hf_unigd.trainer.losses import StructureLoss
from hf_unigd.trainer.prefixes import PrefixSampler
from tiny_models import make_image, make_vlm
from tiny_teachers import save_teachers


def make_stories(count=12):
    return Dataset.from_dict(
        {
            "messages": [
                [
                    {"role": "user", "content": f"A red cat {place}.<image>It sees a dog. The dog runs.<image>"},
                    {"role": "assistant", "content": f"A car {place}. It is blue."},
                ]
                for place in range(count)
            ],
            "images": [[make_image(place), make_image(100 + place)] for place in range(count)],
            "positive_messages": [[{"role": "user", "content": f"cat {place} and dog"}] for place in range(count)],
        }
    )


@pytest.fixture(scope="module")
def teacher_args(tmp_path_factory):
    return save_teachers(tmp_path_factory.mktemp("teachers"))


def make_trainer(
    folder, teacher_args, rows=None, position="last_slice", head_type="mlp", trainer_kwargs=None, **kwargs
):
    tiny = make_vlm("llava")
    torch.manual_seed(0)
    model = UniGDForConditionalGeneration.from_vlm(
        tiny.model, head_type=head_type, embedding_dim=None if head_type == "none" else 8
    )
    args = UniGDTrainingArguments(
        trust_caption_columns=True,
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 4,
            "max_steps": 3,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "loss_gradient_norm_steps": 1,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            "alignment_weight": 1.0,
            "contrastive_weight": 0.0,
            **vars(teacher_args),
            **kwargs,
        },
    )
    processor = UniGDProcessor(tiny.processor, embedding_position=position)
    return UniGDTrainer(
        model,
        args,
        train_dataset=make_stories() if rows is None else rows,
        processing_class=processor,
        **(trainer_kwargs or {}),
    )


def loss_of(trainer, batch):
    return trainer.compute_loss(
        trainer.model, batch, num_items_in_batch=trainer._get_num_items_in_batch([batch], "cpu")
    )


def test_sugar_is_the_weighted_sum_of_structure_and_next_token(teacher_args, tmp_path):
    trainer = make_trainer(tmp_path, teacher_args, alignment_weight=0.5, causal_lm_weight=2.0, alignment_positions=99)
    examples = [trainer.train_dataset[place] for place in range(4)]
    batch = trainer.data_collator(examples)
    loss = loss_of(trainer, batch)

    processor = trainer.processing_class
    inputs = processor.process_sequences(
        [example.anchor for example in examples],
        [example.target for example in examples],
        sentence_ends=SentenceSplitter(),
        padding_side="right",
    )
    spans = inputs.pop("slice_spans")
    del inputs["spans"]
    backbone = trainer.model.vlm(**inputs)
    embeddings = trainer.model.embed(spans=spans, **inputs)
    slices = [part for example in examples for part in example.slices]
    assert len(slices) == len(spans) == 4 * 7
    place = torch.arange(28)
    teachers = Teachers(teacher_args)
    structure = StructureLoss()(
        embeddings,
        teachers(slices),
        torch.tensor([part.modality for part in slices]),
        place - place % 7,
        place % 7 + 1,
        place // 7,
        slice_columns(teachers.own_width, teachers.cross_width),
    )["loss"]
    torch.testing.assert_close(loss, 0.5 * structure + 2.0 * backbone.loss, rtol=1e-5, atol=1e-5)


def test_precomputed_features_give_the_loss_of_teachers_that_run_in_training(teacher_args, tmp_path):
    rows = make_stories()
    examples = ExampleDataset(rows, RowParser(len, splitter=SentenceSplitter()))
    write_slice_features(examples, teacher_args, tmp_path / "features")
    losses = []
    for kwargs in ({}, {"slice_features": str(tmp_path / "features")}):
        trainer = make_trainer(tmp_path / "run", teacher_args, rows, **kwargs)
        assert ("teachers" not in vars(trainer)) == bool(kwargs)  # the teachers are loaded only if they are needed
        batch = trainer.data_collator([trainer.train_dataset[place] for place in range(4)])
        losses.append(loss_of(trainer, batch).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize(
    ("weights", "kwargs"),
    [
        ((1, 0, 1), {}),
        ((1, 0, 0), {}),
        ((1, 1, 1), {"position": "prompt"}),
        ((1, 1, 1), {}),
        ((1, 0, 1), {"alignment_similarity": "kernel"}),
        ((1, 1, 1), {"alignment_similarity": "kernel", "position": "prompt"}),
        ((1, 0, 1), {"alignment_target": "mean_slice", "triple_kernel": False, "head_type": "none"}),
    ],
    ids=str,
)
def test_every_combination_of_losses_decreases(teacher_args, tmp_path, weights, kwargs):
    names = ("alignment", "contrastive", "causal_lm")
    trainer = make_trainer(
        tmp_path,
        teacher_args,
        max_steps=25,
        learning_rate=1e-3,
        **{f"{name}_weight": float(weight) for name, weight in zip(names, weights, strict=True)},
        **kwargs,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for name, weight in zip(names, weights, strict=True):
        if weight:
            values = [entry[f"{name}_loss"] for entry in logs]
            assert sum(values[-3:]) < 0.99 * sum(values[:3]), name
            assert logs[0][f"{name}_gradient_norm"] > 0
        else:
            assert f"{name}_loss" not in logs[0]


def test_positions_depend_only_on_row_epoch_and_seed(teacher_args, tmp_path):
    trainer = make_trainer(tmp_path, teacher_args, alignment_positions=3)
    dataset, sampler = trainer.train_dataset, PrefixSampler(3, seed=0)

    def lengths(places, epoch, sampler=sampler):
        dataset.set_epoch(epoch)
        examples = [dataset[place] for place in places]
        spans = torch.zeros(sum(len(example.slices) for example in examples), 3, dtype=torch.long)
        _, structure = sampler(examples, spans)
        return structure["lengths"].reshape(len(places), 3).tolist()

    assert lengths([5], 0) == lengths([1, 5], 0)[1:] == lengths([5, 2], 0)[:1]
    rows = list(range(12))
    assert lengths(rows, 0) != lengths(rows, 1)
    assert lengths(rows, 0) != lengths(rows, 0, PrefixSampler(3, seed=1))


def test_chats_without_an_answer_train_with_the_structure_loss_only(teacher_args, tmp_path):
    rows = Dataset.from_dict(
        {"messages": [[{"role": "user", "content": f"A cat {place}. A dog."}] for place in range(8)]}
    )
    trainer = make_trainer(tmp_path, teacher_args, rows)
    trainer.train()
    assert trainer.state.log_history[0]["alignment_loss"] > 0
    assert trainer.state.log_history[0]["causal_lm_loss"] == 0


def test_texts_that_a_teacher_truncates_are_counted_in_the_log(teacher_args, tmp_path):
    def chat(text):
        return [{"role": "user", "content": text}]

    # The cross-modal teacher takes 16 tokens, the text teacher 64. Each step has all four rows.
    rows = Dataset.from_dict({"messages": [chat("A cat."), chat("A dog."), chat("cat " * 20), chat("dog " * 99)]})
    trainer = make_trainer(tmp_path, teacher_args, rows)
    trainer.train()
    counts = [entry["truncated_texts"] for entry in trainer.state.log_history if "truncated_texts" in entry]
    assert counts == [3, 3, 3]


def test_arguments_that_cannot_train_are_refused(teacher_args, tmp_path):
    for wrong in ({"alignment_weight": -1.0}, {"alignment_weight": 0.0, "causal_lm_weight": 0.0}):
        with pytest.raises(ValueError, match="`alignment_weight="):
            make_trainer(tmp_path, teacher_args, **wrong)
    with pytest.raises(ValueError, match="`alignment_positions=0`"):
        make_trainer(tmp_path, teacher_args, alignment_positions=0)
    with pytest.raises(ValueError, match="`dataloader_persistent_workers=True` would keep"):
        make_trainer(tmp_path, teacher_args, dataloader_persistent_workers=True, dataloader_num_workers=1)
    with pytest.raises(ValueError, match="`target` must be one of"):
        make_trainer(tmp_path, teacher_args, alignment_target="dtw")


def test_every_epoch_samples_new_positions_without_accelerates_set_epoch(teacher_args, tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.data_loader.DataLoaderShard.set_epoch", lambda self, epoch: None)
    trainer = make_trainer(tmp_path, teacher_args, max_steps=7)  # 3 steps per epoch
    seen = []
    parse = trainer.train_dataset.parse
    monkeypatch.setattr(trainer.train_dataset, "parse", lambda index: seen.append(parse(index)) or seen[-1])
    trainer.train()
    assert [{example.epoch for example in seen[start : start + 12]} for start in (0, 12, 24)] == [{0}, {1}, {2}]


@torch.no_grad()
def test_evaluation_reports_the_structure_loss_over_blocks(teacher_args, tmp_path):
    """With precomputed features of the training rows, the teachers run in evaluation only."""
    teachers, rows = Teachers(teacher_args), make_stories(6)
    examples = ExampleDataset(make_stories(), RowParser(len, splitter=SentenceSplitter()))
    write_slice_features(examples, teacher_args, tmp_path / "features")
    settings = {"alignment_weight": 0.5, "causal_lm_weight": 2.0, "eval_block_size": 4, "alignment_positions": 99}
    for slice_features in (None, str(tmp_path / "features")):
        trainer = make_trainer(tmp_path, teacher_args, slice_features=slice_features, **settings)
        metrics = trainer.evaluate(rows)
        parsed = [RowParser(len, splitter=SentenceSplitter())(rows[place], place) for place in range(6)]
        total, positions = 0.0, 0
        for block in (parsed[:4], parsed[4:]):
            batch = trainer.data_collator(block)
            (inputs,) = batch["chunks"]
            loss = StructureLoss()(
                trainer.model.eval().embed(**inputs),
                teachers([part for example in block for part in example.slices]),
                **{name: batch["structure"][name] for name in ("modalities", "starts", "lengths", "sample_keys")},
                modality_columns=teachers.modality_columns(),
            )["loss"]
            count = len(batch["structure"]["lengths"])
            total, positions = total + loss.item() * count, positions + count
        assert metrics["eval_alignment_loss"] == pytest.approx(total / positions, rel=1e-4)
        expected = 0.5 * metrics["eval_alignment_loss"] + 2.0 * metrics["eval_causal_lm_loss"]
        assert metrics["eval_loss"] == pytest.approx(expected)
