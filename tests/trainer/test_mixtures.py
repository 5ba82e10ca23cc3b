"""Training on several datasets of different columns."""

import json
from collections import Counter

import pytest
import torch
from datasets import Dataset, Features, Image, Value

from hf_unigd import UniGDProcessor
from hf_unigd.data import DatasetMixture, DatasetSource, RowError
from hf_unigd.trainer import DatasetConfig, UniGDDataCollator, UniGDScriptArguments
from hf_unigd.trainer.sampler import LengthGroupedSampler, SourceBatchSampler
from tiny_models import make_image
from trainer_cases import make_rows, make_trainer, stream


@pytest.fixture
def sources(tmp_path):
    """ShareGPT-4V's paths, an `Image` column, and pairs of texts: no two have a column of the same type."""
    for number in range(8):
        make_image(number).save(tmp_path / f"{number}.png")
    talk = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat on the grass."}]
    shared = Dataset.from_list([{"image": f"{number}.png", "conversations": talk} for number in range(8)])
    encoded = [
        {"image": {"bytes": (tmp_path / f"{n}.png").read_bytes(), "path": None}, "caption": f"a cat {n}"}
        for n in range(8)
    ]
    captions = Dataset.from_list(encoded, features=Features({"image": Image(), "caption": Value("string")}))
    pairs = Dataset.from_dict(
        {"anchor": [f"question {n}" for n in range(12)], "positive": [f"{n}" for n in range(12)]}
    )
    return {"shared": (shared, tmp_path), "captions": (captions, None), "pairs": (pairs, None)}


def mixture(sources, **weights):
    return DatasetMixture(
        [DatasetSource(rows, name, weights.get(name), folder) for name, (rows, folder) in sources.items()]
    )


@pytest.mark.parametrize("streamed", [(), ("captions",), ("shared", "captions", "pairs")])
@pytest.mark.parametrize("weights", [{}, {"shared": 1, "captions": 2, "pairs": 1}])
def test_datasets_of_different_columns_and_image_forms_train_together(tmp_path, sources, streamed, weights):
    for name in streamed:
        rows, folder = sources[name]
        sources[name] = rows.to_iterable_dataset(num_shards=2), folder
    trainer = make_trainer(tmp_path / "out", mixture(sources, **weights), max_steps=3, per_device_train_batch_size=12)
    seen, step = [], trainer.training_step
    trainer.training_step = lambda model, inputs, *args: seen.append(inputs) or step(model, inputs, *args)
    trainer.train()
    assert all(torch.isfinite(torch.tensor(log["loss"])) for log in trainer.state.log_history if "loss" in log)
    assert any("pixel_values" in chunk for batch in seen for chunk in batch["chunks"])
    assert any((chunk["labels"] != -100).any() for batch in seen for chunk in batch["chunks"])
    metrics = trainer.evaluate(mixture(sources))
    assert metrics["eval_causal_lm_loss"] > 0 and metrics["eval_contrastive_loss"] > 0


def test_errors_name_the_dataset(tmp_path, sources):
    rows, _ = sources["shared"]
    with pytest.raises(RowError, match="Row 0 of shared has a missing image"):
        make_trainer(tmp_path / "out", mixture({**sources, "shared": (rows, tmp_path / "elsewhere")}))
    with pytest.raises(ValueError, match=r"other: No accepted row format has the columns \['x'\]"):
        make_trainer(tmp_path / "out", mixture({**sources, "other": (Dataset.from_dict({"x": [1]}), None)}))
    with pytest.raises(TypeError, match="pairs: a mixture with a stream in it takes `datasets` datasets, got list"):
        make_trainer(tmp_path / "out", mixture({"stream": (stream(), None), "pairs": ([{"anchor": "a"}], None)}))


@pytest.mark.parametrize("streamed", [False, True])
def test_batches_of_one_dataset(tmp_path, streamed, monkeypatch):
    rows = {name: make_rows(24, caption_id=[name] * 24) for name in "ab"}
    rows["b"] = rows["b"].select(range(16))
    parts = [DatasetSource(each.to_iterable_dataset() if streamed else each, name) for name, each in rows.items()]
    trainer = make_trainer(tmp_path, DatasetMixture(parts), batch_by_source=True, max_steps=20)
    monkeypatch.setattr(
        UniGDDataCollator, "__call__", lambda self, examples: {"sources": [example.source for example in examples]}
    )
    loader = trainer.get_train_dataloader()
    batches = [batch["sources"] for batch, _ in zip(loader, range(10), strict=False)]
    assert all(len(set(names)) == 1 for names in batches)
    counts = Counter(names[0] for names in batches)
    assert counts == {"a": 6, "b": 4} if not streamed else len(counts) == 2


def test_the_instructions_of_a_dataset_precede_its_rows_and_are_saved(tmp_path):
    rows = Dataset.from_dict({"anchor": ["a", "b"], "positive": ["c", "d"]})
    parts = [DatasetSource(rows, "plain"), DatasetSource(rows, "asked", None, None, "Find it.", "An answer.")]
    trainer = make_trainer(tmp_path, DatasetMixture(parts), per_device_train_batch_size=2)
    batch = trainer.data_collator(list(trainer.train_dataset))
    anchors, candidates = (trainer.processing_class.batch_decode(chunk["input_ids"]) for chunk in batch["chunks"])
    assert ["Find it" in text for text in anchors] == [False, False, True, True]
    assert ["An answer" in text for text in candidates] == [False, False, True, True]
    trainer.save_model()
    saved = UniGDProcessor.from_pretrained(tmp_path).instructions
    assert saved["asked"] == "Find it." and saved["asked document"] == "An answer."


def test_batches_of_one_dataset_need_enough_rows(tmp_path):
    parts = [DatasetSource(make_rows(rows), name) for name, rows in (("a", 9), ("b", 3))]
    with pytest.raises(ValueError, match="the share of b is 3 rows"):
        make_trainer(tmp_path, DatasetMixture(parts), batch_by_source=True)
    with pytest.raises(ValueError, match="both choose the rows"):
        make_trainer(tmp_path, batch_by_source=True, train_sampling_strategy="group_by_length")


def test_a_sampler_fills_batches_from_one_dataset_and_leaves_out_the_rest():
    sampler = SourceBatchSampler([0, 10, 13, 30], batch_size=4, seed=3)
    orders = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert len(order) == len(sampler) == 24 == len(set(order))
        owners = [0 if place < 10 else 1 if place < 13 else 2 for place in order]
        assert all(len(set(owners[start : start + 4])) == 1 for start in range(0, 24, 4)) and 1 not in owners
        orders.append(order)
    assert orders[0] != orders[1]


def test_a_mixture_is_grouped_by_length(tmp_path):
    long = [DatasetSource(make_rows(24), "a", 1), DatasetSource(make_rows(8), "b", 3)]
    trainer = make_trainer(tmp_path, DatasetMixture(long), train_sampling_strategy="group_by_length", max_steps=9)
    sampler = trainer._get_train_sampler()
    assert isinstance(sampler, LengthGroupedSampler) and sorted(sampler) == list(range(32))
    trainer.train()


def parse(**values):
    return UniGDScriptArguments(**values)


def write_jsonl(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_the_entries_of_datasets_are_loaded(tmp_path):
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"q": f"{n}", "positive": "b", "x": 1} for n in range(10)])
    entry = {
        "path": pairs,
        "weight": 2,
        "rename_columns": {"q": "anchor"},
        "columns": ["anchor", "positive"],
        "image_folder": "pictures",
    }
    files = {"path": "json", "data_files": pairs, "weight": 1, "rename_columns": {"q": "anchor"}}
    rows = parse(datasets=[entry, files]).load_train_rows()
    first, second = rows.sources
    assert (first.name, first.weight, first.image_folder) == (pairs, 2, "pictures")
    assert first.rows.column_names == ["anchor", "positive"] and len(second.rows) == 10
    streamed = parse(datasets=[entry], streaming=True).load_train_rows().sources[0].rows
    assert next(iter(streamed)) == {"anchor": "0", "positive": "b"}
    split = parse(datasets=[entry], test_split_size=0.2)
    train, test = split.load_train_rows().sources[0].rows, split.load_eval_rows().sources[0].rows
    assert (len(train), len(test)) == (8, 2)
    assert sorted([*train["anchor"], *test["anchor"]]) == sorted(str(n) for n in range(10))
    several = parse(datasets=[entry], eval_datasets=[{**entry, "name": None}]).load_eval_rows()
    assert list(several) == [pairs] and isinstance(several[pairs], DatasetMixture)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "Either `dataset_name` is required"),
        ({"dataset_name": "a", "datasets": [{"path": "b"}]}, "Either `dataset_name` is required"),
        ({"datasets": [{"name": "b"}]}, "Each entry of `datasets` needs a `path`"),
        ({"datasets": [{"path": "b", "wieght": 2}]}, "unknown keys wieght"),
        ({"datasets": [{"path": "b", "fraction": 0.5}]}, "b: `fraction` is not supported"),
        ({"dataset_name": "a", "streaming": True}, "go with `datasets`"),
        ({"datasets": [{"path": "b"}], "rename_columns": ["a:b"]}, "in the entries"),
        ({"datasets": [{"path": "b"}], "streaming": True, "test_split_size": 0.1}, "cannot split streams"),
        ({"datasets": [{"path": "b"}], "test_split_size": 1, "eval_datasets": [{"path": "b"}]}, "not both"),
    ],
)
def test_wrong_entries_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        parse(**values)
    assert DatasetConfig("a").weight is None


def test_evaluation_and_single_datasets_need_to_be_named():
    with pytest.raises(ValueError, match="needs `eval_datasets` or `test_split_size`"):
        parse(datasets=[{"path": "icons"}]).load_eval_rows()
    with pytest.raises(ValueError, match="This command reads one dataset"):
        parse(datasets=[{"path": "icons"}]).load_rows("train")
