"""Runs the example script with its recipe for two steps on a tiny model and local data with the same columns."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, load_from_disk
from safetensors import safe_open

from hf_unigd.cli.main import main
from hf_unigd.data import ExampleDataset, RowParser, SentenceSplitter
from tiny_models import make_image, make_vlm
from tiny_teachers import save_teachers


EXAMPLES = Path(__file__).parents[2] / "examples" / "sugar"
COUNT = 6


def article(place):
    """Returns an MMC4 article with two images, listed in another order than the sentences that they match."""
    return {
        "text_list": [f"A red cat {place}.", "It sleeps. It wakes.", "Two dogs."],
        "image_info": [
            {"image_name": f"{place}b.png", "matched_text_index": 2, "matched_sim": 0.3, "raw_url": "http://b"},
            {"image_name": f"{place}a.png", "matched_text_index": 0, "matched_sim": 0.2, "raw_url": "http://a"},
        ],
        "url": "http://page",
    }


def conversation(place):
    turns = [("human", "<image>\nWhat is it?"), ("gpt", "A cat."), ("human", "Sure?"), ("gpt", f"Yes, cat {place}.")]
    row = {"id": str(place), "conversations": [{"from": who, "value": text} for who, text in turns]}
    if place % 3 == 0:  # LLaVA's mixture includes chats without an image
        row["conversations"][0]["value"] = "What is it?"
        return row
    return {**row, "image": f"{place}a.png"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the recipe's three data sets, a tiny model, tiny teachers and a recipe that names them."""
    folder = tmp_path_factory.mktemp("sugar")
    tiny = make_vlm()
    tiny.model.save_pretrained(folder / "vlm")
    tiny.processor.save_pretrained(folder / "vlm")
    config = yaml.safe_load((EXAMPLES / "llava_1.5_7b.yaml").read_text())
    parts = [folder / part["path"] for part in config["datasets"]]
    for part in [*parts, folder / config["image_folder"]]:
        part.mkdir(parents=True)
    for place in range(COUNT):
        for name, seed in (("a", place), ("b", 100 + place)):
            make_image(seed).save(folder / config["image_folder"] / f"{place}{name}.png")
    mmc4, coyo, llava = parts
    (mmc4 / "docs_shard_0.jsonl").write_text("\n".join(json.dumps(article(place)) for place in range(COUNT)))
    pairs = {"image": [make_image(200 + place) for place in range(COUNT)], "text": ["two blue dogs"] * COUNT}
    Dataset.from_dict({**pairs, "id": list(range(COUNT))}).to_parquet(str(coyo / "train.parquet"))
    (llava / "mix.json").write_text(json.dumps([conversation(place) for place in range(COUNT)]))

    teachers = save_teachers(folder / "teachers")
    names = ("image_teacher", "text_teacher", "cross_teacher")
    config |= {name: getattr(teachers, name) for name in names}
    config |= {"model_name_or_path": "vlm", "dtype": "float32", "bf16": False, "use_cpu": True, "report_to": "none"}
    config |= {"max_steps": 2, "per_device_train_batch_size": 8, "dataloader_num_workers": 0, "logging_steps": 1}
    config |= {"embedding_dim": 8, "max_length": 200}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train_sugar.py", "--config", "config.yaml", *arguments])
    runpy.run_path(str(EXAMPLES / "train_sugar.py"), run_name="__main__")


def logged(output):
    entries = json.loads((output / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in entries if "loss" in entry]


def test_the_recipe_runs_with_teachers_in_training_and_with_precomputed_features(folder, monkeypatch):
    monkeypatch.chdir(folder)
    run(monkeypatch, "--output_dir", "in_training")
    with safe_open(folder / "in_training" / "adapter_model.safetensors", "pt") as adapter:
        shapes = {name: adapter.get_slice(name).get_shape() for name in adapter.offset_keys()}
    lora = {name: shape for name, shape in shapes.items() if name.endswith("lora_A.weight")}
    assert {name.split(".")[-3] for name in lora} == {"q_proj", "v_proj"}
    assert {shape[0] for shape in lora.values()} == {128}
    assert any("embedding_head" in name for name in shapes)

    run(monkeypatch, "--save_rows", "rows")
    assert len(load_from_disk("rows")) == 3 * COUNT
    config = yaml.safe_load(Path("config.yaml").read_text())
    flags = {name: value for name, value in config.items() if name.endswith("_teacher") or name == "image_folder"}
    flags |= {"model": "vlm", "dataset_name": "rows", "output": "features"}
    main(["embed-slices", *(part for name, value in flags.items() for part in (f"--{name}", value))])
    run(monkeypatch, "--output_dir", "before", "--slice_features", "features")

    first, second = (logged(folder / name) for name in ("in_training", "before"))
    for one, other in zip(first, second, strict=True):
        assert one["alignment_loss"] > 0 and one["causal_lm_loss"] > 0 and "contrastive_loss" not in one
        assert one["alignment_loss"] == pytest.approx(
            other["alignment_loss"], rel=1e-2
        )  # the features are stored in half precision
        assert one["causal_lm_loss"] == pytest.approx(other["causal_lm_loss"], rel=1e-3)


def test_rows_of_every_data_set_become_slices(folder, monkeypatch):
    monkeypatch.chdir(folder)
    run(monkeypatch, "--save_rows", "rows_again")
    examples = ExampleDataset(
        load_from_disk("rows_again"), RowParser(len, image_folder="data/images", splitter=SentenceSplitter())
    )

    def contents(example):
        return [one.content for one in example.slices]

    first = [make_image(0), "A red cat 0.", "It sleeps.", "It wakes.", make_image(100), "Two dogs."]
    assert contents(examples[0]) == first and examples[0].target is None
    assert contents(examples[COUNT]) == [make_image(200), "two blue dogs"] and examples[COUNT].target is None
    chat = ["What is it?", "A cat.", "Sure?", "Yes, cat 0."]
    assert contents(examples[2 * COUNT]) == chat and examples[2 * COUNT].target == "Yes, cat 0."
    assert contents(examples[2 * COUNT + 1])[:2] == [make_image(1), "What is it?"]


def test_other_columns_are_refused():
    script = runpy.run_path(str(EXAMPLES / "train_sugar.py"))
    with pytest.raises(ValueError, match=r"\['picture', 'text'\] are not those of MMC4"):
        script["sugar_rows"](Dataset.from_dict({"picture": ["a.png"], "text": ["a"]}))


def test_the_script_is_short():
    assert len((EXAMPLES / "train_sugar.py").read_text().splitlines()) <= 150
