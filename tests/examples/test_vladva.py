"""Runs the example script with every recipe for two steps on a tiny model of its family and local data with the same
columns."""

import copy
import runpy
import sys
from pathlib import Path

import pytest
import transformers
import yaml
from datasets import Dataset

from tiny_models import make_image, make_vlm, stand_ins


EXAMPLES = Path(__file__).parents[2] / "examples" / "vladva"

COLUMNS = {
    "data/cc3m": {"jpg": "image", "txt": "short", "long_caption": "long"},
    "data/openimages_4m": {"image": "image", "short_caption": "short", "long_caption": "long"},
    "data/sharegpt4v": {"image": "image", "short_caption": "short", "conversations": "chat"},
}


def value(kind, place):
    if kind == "image":
        return make_image(place)
    if kind == "chat":
        return [
            {"from": "human", "value": "<image>\nDescribe it."},
            {"from": "gpt", "value": f"A picture of cat {place}."},
        ]
    return f"{kind} cat {place}"


FAMILIES = {
    "llava_1.5_7b.yaml": "llava",
    "llava_1.5_7b_single_gpu.yaml": "llava",
    "smolvlm_256m_single_gpu.yaml": "smolvlm",
    "qwen3_vl_2b_8gpu.yaml": "qwen3_vl",
}


def test_every_recipe_is_run():
    assert FAMILIES.keys() == {file.name for file in EXAMPLES.glob("*.yaml")}


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
    for part in config["datasets"]:
        folder = tmp_path / part["path"]
        folder.mkdir(parents=True)
        rows = {name: [value(kind, place) for place in range(12)] for name, kind in COLUMNS[part["path"]].items()}
        Dataset.from_dict(rows).to_parquet(str(folder / "train.parquet"))
    if config.get("load_in_4bit"):
        config["load_in_4bit"] = False  # bitsandbytes is optional; tests/trainer/test_quantization.py loads in 4 bits
    config |= {"model_name_or_path": "vlm", "dtype": "float32", "bf16": False, "use_cpu": True, "report_to": "none"}
    config |= {"max_steps": 2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "eval_steps": 2}
    if "gradient_cache_chunk_size" in config:
        config["gradient_cache_chunk_size"] = 3
    config |= {"test_split_size": 0.2, "dataloader_num_workers": 0, "logging_steps": 1}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(sys, "argv", ["train_vladva.py", "--config", "config.yaml"])
    runpy.run_path(str(EXAMPLES / "train_vladva.py"), run_name="__main__")
    assert (tmp_path / config["output_dir"] / "adapter_model.safetensors").is_file()


def test_the_script_is_short():
    assert len((EXAMPLES / "train_vladva.py").read_text().splitlines()) <= 150
