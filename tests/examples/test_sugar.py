"""Runs the example script with its recipe for two steps on a tiny model and rows as they are published."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from safetensors import safe_open

from hf_unigd.cli.main import main
from hf_unigd.data import ExampleDataset, RowParser, SentenceSplitter
from hf_unigd.data.images import open_image
from hf_unigd.trainer import UniGDScriptArguments
from published_rows import jpeg, write_tar
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
    images = folder / config["image_folder"]
    images.mkdir(parents=True)
    for place in range(COUNT):
        for name, seed in (("a", place), ("b", 100 + place)):
            make_image(seed).save(images / f"{place}{name}.png")
    mmc4, coyo, llava = (folder / part["path"] for part in config["datasets"])
    mmc4.parent.mkdir()
    (mmc4.parent / "docs_shard_0.jsonl").write_text("\n".join(json.dumps(article(place)) for place in range(COUNT)))
    coyo.parent.mkdir()
    samples = {
        f"{place:05d}": {
            "jpg": jpeg(200 + place),
            "txt": b"two blue dogs",
            "json": json.dumps({"key": place}).encode(),
        }
        for place in range(COUNT)
    }
    write_tar(coyo.parent / "00000.tar", samples)
    llava.write_text(json.dumps([conversation(place) for place in range(COUNT)]))

    teachers = save_teachers(folder / "teachers")
    names = ("image_teacher", "text_teacher", "cross_teacher")
    config |= {name: getattr(teachers, name) for name in names}
    config |= {"model_name_or_path": "vlm", "dtype": "float32", "bf16": False, "use_cpu": True, "report_to": "none"}
    config |= {"max_steps": 2, "per_device_train_batch_size": 8, "dataloader_num_workers": 0, "logging_steps": 1}
    config |= {"embedding_dim": 8, "max_length": 200}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "config.yaml", *arguments])
    runpy.run_path(str(EXAMPLES.parent / "train.py"), run_name="__main__")


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

    config = yaml.safe_load((EXAMPLES / "slice_features.yaml").read_text())
    config |= {
        name: value for name, value in yaml.safe_load(Path("config.yaml").read_text()).items() if "teacher" in name
    }
    Path("slices.yaml").write_text(yaml.safe_dump({**config, "model": "vlm", "output": "features"}))
    main(["embed-slices", "--config", "slices.yaml"])
    assert len(Dataset.from_file("features/rows.arrow")) == 3 * COUNT
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
    config = yaml.safe_load(Path("config.yaml").read_text())
    parser = RowParser(len, 0, image_folder="data/images", splitter=SentenceSplitter())
    examples = [
        list(ExampleDataset(source.rows, source.parser(parser)))
        for source in UniGDScriptArguments(datasets=config["datasets"]).load_train_rows().sources
    ]

    def contents(example):
        return [one.content if isinstance(one.content, str) else one.content.tobytes() for one in example.slices]

    mmc4, coyo, llava = examples
    first = [
        make_image(0).tobytes(),
        "A red cat 0.",
        "It sleeps.",
        "It wakes.",
        make_image(100).tobytes(),
        "Two dogs.",
    ]
    assert contents(mmc4[0]) == first and mmc4[0].target is None
    assert contents(coyo[0]) == [open_image(jpeg(200)).tobytes(), "two blue dogs"] and coyo[0].target is None
    assert contents(llava[0]) == ["What is it?", "A cat.", "Sure?", "Yes, cat 0."]
    assert llava[0].target == "Yes, cat 0." and llava[0].label_history
    assert contents(llava[1])[:2] == [make_image(1).tobytes(), "What is it?"]
