"""`UniGDTrainer` evaluates rows of every form: the objective, retrieval, and what callbacks make of it."""

import math
import socket

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from datasets import DatasetDict
from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
)

from hf_unigd.data import RowError
from hf_unigd.evaluation import rank_candidates, retrieval, retrieval_metrics
from hf_unigd.evaluation.embedders import ModelEmbedder
from hf_unigd.evaluation.row_evaluation import evaluate_rows
from tiny_models import make_image
from trainer_cases import make_rows, make_trainer


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
        ranked = count_ranked_queries(patch)
        metrics = trainer.evaluate()
        share = sum(ranked)
        prediction = trainer.predict(make_rows(10))
        torch.save((metrics, share, prediction.predictions, prediction.label_ids), folder / f"metrics_{rank}.pt")
        torch.distributed.destroy_process_group()


def count_ranked_queries(patch):
    """Lets queries be ranked three at a time. Returns a list that grows by their numbers."""
    ranked = []

    def rank(queries, candidates, k):
        ranked.append(len(queries))
        return rank_candidates(queries, candidates, k)

    patch.setattr(retrieval, "RANKED_TOGETHER", 3)
    patch.setattr(retrieval, "rank_candidates", rank)
    return ranked


def test_two_processes_report_the_metrics_of_one(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(evaluate_on_rank, (port, tmp_path), nprocs=2)
    trainer = make_trainer(tmp_path, eval_rows=make_rows(10), eval_block_size=4)
    ranked = count_ranked_queries(monkeypatch)
    expected = trainer.evaluate()
    one_share, shares = sum(ranked), []
    whole = trainer.predict(make_rows(10))
    for rank in (0, 1):
        metrics, share, predictions, labels = torch.load(tmp_path / f"metrics_{rank}.pt", weights_only=False)
        shares.append(share)
        assert labels["rows"].tolist() == list(range(10))
        assert_same_metrics(expected, metrics)
        assert all(metrics[name] == value for name, value in expected.items() if "recall" in name)
        for name, array in whole.predictions.items():
            np.testing.assert_allclose(predictions[name], array, rtol=1e-5, atol=1e-6, err_msg=name)
    assert sum(shares) == one_share and min(shares) > 0


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
    assert len(set(labels["positive_keys"])) == 6  # the fourth caption equals the first one, and is another image's
    order = (anchors @ positives.T).argsort(dim=1, descending=True, stable=True)
    assert predictions["anchor_to_positive"].tolist() == order.tolist()
    keys = (torch.tensor(labels[name]) for name in ("anchor_keys", "positive_keys"))
    for name, value in retrieval_metrics(anchors, positives, *keys).items():
        assert metrics[f"eval_{name}"] == value
    assert metrics["eval_positive_to_anchor_queries"] == metrics["eval_anchor_to_positive_candidates"] == 6
    assert trainer.predict(rows, ignore_keys=["anchors"]).predictions.keys() == predictions.keys() - {"anchors"}


def test_captions_of_any_length_are_queries_and_candidates(tmp_path):
    """Captions of 30 or more tokens are targets of generation too, and must not leave the pool."""
    captions = [
        f"{place} " + "a red cat and two blue dogs on the green grass " * (8 * (place % 2)) for place in range(8)
    ]
    rows = [{"image": row["image"], "caption": text} for row, text in zip(make_rows(8), captions, strict=True)]
    for weight in (1.0, 0.0):  # Sugar trains without a contrastive loss
        metrics = make_trainer(tmp_path, eval_rows=rows, contrastive_weight=weight).evaluate()
        assert metrics["eval_anchor_to_positive_queries"] == metrics["eval_anchor_to_positive_candidates"] == 8
        assert metrics["eval_rows_without_match"] == 0 and metrics["eval_perplexity"] > 1


def test_a_caption_of_two_images_is_two_queries_and_an_image_of_two_rows_is_one(tmp_path):
    images = [row["image"] for row in make_rows(2)]
    rows = [{"image": image, "short_caption": text} for image in images for text in ("a cat", "a dog")]
    rows.append({"image": images[0], "long_caption": "a picture of a red cat"})
    metrics = make_trainer(tmp_path, eval_rows=rows, trust_caption_columns=True).evaluate()
    assert metrics["eval_positive_to_anchor_queries"] == 4 and metrics["eval_anchor_to_positive_queries"] == 2
    # Equal captions are equally near to both images, and each is the match of one.
    assert metrics["eval_positive_to_anchor_recall_at_1"] == 0.5
    assert metrics["eval_rows_without_match"] == 1


def identified_rows(equal=True):
    """Four images, each with three captions, some of them twice: a row for each, with the ids of the image and of the
    caption. If they are `equal`, two images have the same pixels, and all images the same captions."""
    images = [make_image(place) for place in ((0, 0, 1, 2) if equal else (0, 3, 1, 2))]
    rows = [
        {
            "image": image,
            "short_caption": text if equal else f"{text} {place}",
            "image_id": place,
            "caption_id": f"{place} {text}",
        }
        for place, image in enumerate(images)
        for text in ("a cat", "two dogs", "a cat on the grass")
    ]
    return rows + rows[2:7]


def test_ids_say_what_an_item_is_as_in_the_command(tmp_path):
    rows = identified_rows(equal=False)  # of equal contents, rounding would say which is nearer
    trainer = make_trainer(tmp_path, eval_rows=rows, eval_block_size=5)
    metrics = trainer.evaluate()
    embedder = ModelEmbedder(trainer.model, trainer.processing_class, "tiny")
    expected = evaluate_rows(embedder, rows, "rows", {}, show_progress=False)
    for name in [*(each for each in expected.metrics if "recall" in each), *expected.counts]:
        if name not in ("rows", "left_out", "skipped"):
            assert metrics[f"eval_{name}"] == {**expected.metrics, **expected.counts}[name], name
    rows = identified_rows()
    metrics = trainer.evaluate(rows)
    assert metrics["eval_anchor_to_positive_queries"] == 4 and metrics["eval_positive_to_anchor_queries"] == 12
    # Without the ids, images of equal pixels are one item, and a caption that is written twice is two.
    plain = trainer.evaluate([{name: row[name] for name in ("image", "short_caption")} for row in rows])
    assert plain["eval_anchor_to_positive_queries"] == 3 and plain["eval_positive_to_anchor_queries"] == 17


def test_a_drawn_caption_has_the_id_of_its_place(tmp_path):
    rows = [
        {"image": make_image(0), "short_caption": ["a cat", "two dogs"], "image_id": 7, "caption_id": [70, 71]}
        for _ in range(8)
    ]
    metrics = make_trainer(tmp_path, eval_rows=rows).evaluate()
    assert metrics["eval_anchor_to_positive_queries"] == 1 and metrics["eval_positive_to_anchor_queries"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 0}, "Rows 0 and 3 have the same `image_id` and different content. Correct the ids"),
        ({"image_id": 9, "caption_id": "0 a cat"}, "Rows 0 and 3 have the same `caption_id` and different content"),
        ({"image_id": [1]}, "Row 3 has a `image_id` of type list, but a number or a text is needed"),
    ],
)
def test_ids_that_contradict_the_rows_are_refused(tmp_path, change, message):
    rows = identified_rows()[6:12]
    rows[3] |= {"image": make_image(5), "short_caption": "a star", **change}
    rows[0] |= {"image_id": 0, "caption_id": "0 a cat"}
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, eval_rows=rows).evaluate()
