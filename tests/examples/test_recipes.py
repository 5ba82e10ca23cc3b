"""Runs the example script with every recipe of VladVA and of universal embedders for two steps, on a tiny model of its
family and on rows as they are published. tests/data/test_published.py names the source of each schema, and
test_sugar.py runs Sugar's recipe."""

import copy
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import transformers
import yaml
from datasets import Dataset

from published_rows import jpeg, write_tar
from tiny_models import make_vlm, stand_ins


EXAMPLES = Path(__file__).parents[2] / "examples"
FAMILIES = {
    "vladva/llava_1.5_7b.yaml": "llava",
    "vladva/llava_1.5_7b_8gpu.yaml": "llava",
    "vladva/llava_1.5_7b_single_gpu.yaml": "llava",
    "vladva/smolvlm_256m_single_gpu.yaml": "smolvlm",
    "vladva/qwen3_vl_2b_8gpu.yaml": "qwen3_vl",
    "universal/qwen3_vl_2b_mmeb.yaml": "qwen3_vl",
}
COUNT = 12
SHORT = [f"a cat {place}" for place in range(COUNT)]
LONG = ["A cat sleeps on the grass of the garden. " * 5 + f"It is cat {place}." for place in range(COUNT)]


def write_captions(path):
    """Images with both captions, as `hf-unigd caption` leaves them."""
    path.mkdir(parents=True)
    images = [{"bytes": jpeg(place), "path": None} for place in range(COUNT)]
    Dataset.from_dict({"image": images, "short_caption": SHORT, "long_caption": LONG}).to_parquet(
        path / "rows.parquet"
    )


def write_cc3m(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in range(2):
        samples = {
            f"{number}{place:08d}": {
                "jpg": jpeg(place),
                "txt": SHORT[place].encode(),
                "json": json.dumps({"caption": SHORT[place], "key": f"{place}", "status": "success"}).encode(),
            }
            for place in range(number, COUNT, 2)
        }
        write_tar(Path(str(path).replace("*", f"{number:04d}")), samples)


def shared_rows(folder):
    """ShareGPT-4V: paths of images, which are written to `folder`, and conversations with one answer."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for place, caption in enumerate(LONG):
        (folder / f"{place}.jpg").write_bytes(jpeg(place))
        question = {"from": "human", "value": "What do you see happening in this image?\n<image>"}
        rows.append(
            {"id": f"{place}", "image": f"{place}.jpg", "conversations": [question, {"from": "gpt", "value": caption}]}
        )
    return rows


def write_shared(path, folder):
    rows = shared_rows(folder)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.mkdir(parents=True)
        for row, caption in zip(rows, SHORT, strict=True):
            row["short_caption"] = caption
        Dataset.from_list(rows).to_parquet(path / "rows.parquet")


def write_mmeb(path, folder, names):
    """One configuration for each task, whose splits are Parquet files."""
    (folder / "images").mkdir(parents=True)
    columns = ("qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path")
    for task in names:
        rows = []
        for place in range(COUNT):
            file = f"images/{task}_{place}.jpg"
            (folder / file).write_bytes(jpeg(place))
            values = (f"<|image_1|>\nRepresent the image: {task}\n", file, f"a cat {place}", "", "", "")
            rows.append(dict(zip(columns, values, strict=True)))
        (path / task).mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows).to_parquet(path / task / "original-00000-of-00001.parquet")
    configs = [
        {"config_name": task, "data_files": [{"split": "original", "path": f"{task}/original-*"}]} for task in names
    ]
    (path / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")


def write_rows(config, tmp_path):
    """Writes what the entries of a recipe name."""
    for part in [*config["datasets"], *config.get("eval_datasets", [])]:
        path, folder = tmp_path / part["path"], tmp_path / part.get("image_folder", ".")
        if "cc3m-" in part["path"]:
            write_cc3m(path)
        elif "sharegpt4v" in part["path"]:
            write_shared(path, folder)
        elif "MMEB" not in part["path"]:
            write_captions(path)
    tasks = [part["name"] for part in config["datasets"] if "MMEB" in part["path"]]
    if tasks:
        write_mmeb(tmp_path / "TIGER-Lab/MMEB-train", tmp_path / "data/MMEB-train", tasks)


def test_every_recipe_is_run():
    files = {file.relative_to(EXAMPLES).as_posix() for file in EXAMPLES.glob("*/*.yaml")}
    assert FAMILIES.keys() == {file for file in files if not re.match("accelerate|sugar", file)}


@pytest.mark.parametrize("recipe", FAMILIES)
def test_the_recipe_runs_for_two_steps(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = make_vlm(FAMILIES[recipe])
    tiny.model.save_pretrained("vlm")
    tiny.processor.save_pretrained("vlm")
    if stand_ins(FAMILIES[recipe]):  # transformers would not load a part of this processor without torchvision
        real = getattr(transformers, type(tiny.processor).__name__)
        monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda *_, **__: tiny.processor)
        monkeypatch.setattr(real, "from_pretrained", lambda *_, **__: copy.deepcopy(tiny.processor))
    config = yaml.safe_load((EXAMPLES / recipe).read_text())
    write_rows(config, tmp_path)
    if config.get("load_in_4bit"):
        config["load_in_4bit"] = False  # bitsandbytes is optional; tests/trainer/test_quantization.py loads in 4 bits
    config |= {"model_name_or_path": "vlm", "dtype": "float32", "bf16": False, "use_cpu": True, "report_to": "none"}
    config |= {"max_steps": 2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "eval_steps": 2}
    if "gradient_cache_chunk_size" in config:
        config["gradient_cache_chunk_size"] = 3
    if config.get("test_split_size"):
        config["test_split_size"] = 0.2
    config |= {"dataloader_num_workers": 0, "logging_steps": 1, "skip_bad_rows": False}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "config.yaml"])
    runpy.run_path(str(EXAMPLES / "train.py"), run_name="__main__")
    output = tmp_path / config["output_dir"]
    assert (output / "adapter_model.safetensors").is_file()
    history = json.loads((output / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert [entry["contrastive_loss"] > 0 for entry in history if "loss" in entry] == [True, True]
    if config.get("causal_lm_weight", 1):
        assert any(entry.get("causal_lm_loss", 0) > 0 for entry in history)
    if config.get("eval_strategy"):
        assert any(re.search("anchor_to_positive_recall_at_1$", name) for entry in history for name in entry)


def test_the_script_is_short():
    assert len((EXAMPLES / "train.py").read_text().splitlines()) <= 150
