"""Model cards: their metadata, their snippets, and that they give nothing away."""

import importlib.util
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from hf_unigd.hub import make_model_card
from hf_unigd.hub.cards import is_hub_id
from hf_unigd.trainer import UniGDTrainer, UniGDTrainingArguments
from tiny_models import make_image, make_vlm


TOKEN = "hf_planted0token"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained and saved tiny model with its card; secrets are planted wherever a user has them."""
    folder = tmp_path_factory.mktemp("planted_home") / "tiny-cats"
    tiny = make_vlm()
    rows = Dataset.from_dict(
        {
            "image": [make_image(place) for place in range(8)],
            "short_caption": [f"cat {place}" for place in range(8)],
            "long_caption": [f"A cat, seen {place} times." for place in range(8)],
        }
    )
    args = UniGDTrainingArguments(
        trust_caption_columns=True,
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=2,
        logging_steps=1,
        learning_rate=3e-3,
        causal_lm_weight=0.25,
        image_folder=str(folder.parent),
        hub_model_id="someone/tiny-cats",
        hub_token=TOKEN,
        eval_strategy="steps",
        eval_steps=2,
        report_to=[],
        use_cpu=True,
    )
    model, processor = UniGDForConditionalGeneration.from_vlm(tiny.model), UniGDProcessor(tiny.processor)
    model.processor = processor
    trainer = UniGDTrainer(model, args, train_dataset=rows, eval_dataset=rows, processing_class=processor)
    trainer.hub_model_id = args.hub_model_id
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(model_name="tiny-cats", dataset_name="someone/cats", license="mit")
    return trainer, folder


def test_the_card_tells_what_the_run_knows(run):
    _, folder = run
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "image-text-to-text"
    assert card.data.datasets == ["someone/cats"] and card.data.license == "mit"
    assert {"hf-unigd", "sentence-transformers", "vladva"} <= set(card.data.tags)
    assert "1 · InfoNCE + 0.25 · next-token" in card.text
    for setting in ("| learning_rate | 0.003 |", "| global batch | 4 |", "| steps | 2 |"):
        assert setting in card.text
    assert "ouali2025vladva" in card.text and "chow2024sugar" not in card.text
    assert "![The losses over the steps](curves.png)" in card.text
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_its_metrics_are_the_evaluations(run):
    trainer, folder = run
    raw = ModelCard.load(folder / "README.md").data.to_dict()["model-index"]
    name, results = model_index_to_eval_results(raw)  # huggingface_hub's own validation
    (logged,) = [entry for entry in trainer.state.log_history if "eval_perplexity" in entry]
    assert name == "tiny-cats"
    seen = {result.metric_type: result.metric_value for result in results}
    for metric in ("anchor_to_positive_recall_at_1", "positive_to_anchor_recall_at_5", "perplexity"):
        assert seen[metric] == pytest.approx(logged[f"eval_{metric}"], abs=1e-4)
    assert {result.dataset_name for result in results} == {"someone/cats"}
    assert not [metric for metric in seen if "runtime" in metric or "second" in metric]


def test_nothing_private_is_written(run):
    trainer, folder = run
    for file in [*folder.rglob("*")]:
        if file.is_file() and "checkpoint-" not in str(file):
            content = file.read_bytes()
            assert TOKEN.encode() not in content and b"planted_home" not in content, file
    assert not list(folder.rglob("training_args.bin"))
    assert TOKEN.encode() not in pickle.dumps(trainer.args)
    assert trainer.args.hub_token == TOKEN  # the run itself keeps it


def test_the_snippets_run(run):
    """As they stand in the card, but for the id, in one process that cannot import hf_unigd."""
    trainer, folder = run
    make_image(5, (40, 30)).save(folder.parent / "photo.jpg")
    snippets = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(snippets) == 2
    used = "\n".join(snippets).replace("someone/tiny-cats", str(folder))
    code = f"import json, sys\nsys.modules['hf_unigd'] = None\n{used}\nprint(json.dumps(embeddings.tolist()))\n"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=folder.parent,
        env={"PATH": "", "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder.parent / "modules")},
    )
    assert result.returncode == 0, result.stderr
    sequences = ["a red car", Image.open(folder.parent / "photo.jpg")]
    expected = trainer.model.embed(**trainer.processing_class.process_sequences(sequences))
    assert json.loads(result.stdout.splitlines()[-1]) == [pytest.approx(row, abs=1e-5) for row in expected.tolist()]


def test_the_recipes_cards_follow_the_recipes():
    spec = importlib.util.spec_from_file_location("render", ROOT / "model_cards" / "render.py")
    render = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(render)
    for name in render.RECIPES:
        card = ModelCard.load(ROOT / "model_cards" / f"{name}.md")
        assert card.content.strip() == render.render(name).content.strip(), "run `python model_cards/render.py`"
        recipe = yaml.safe_load((ROOT / render.RECIPES[name]["recipe"]).read_text())
        assert card.data.base_model == recipe["model_name_or_path"] and "model-index" not in card.data.to_dict()
        assert "no weights of it are published" in card.text and "Nothing was measured" in card.text
    assert "| lora_r | 16 |" in ModelCard.load(ROOT / "model_cards" / "vladva-llava-1.5-7b.md").text


def test_metrics_need_the_name_of_their_data():
    with pytest.raises(ValueError, match="`metrics` need `dataset`"):
        make_model_card("a/b", "b", "x.", {}, "none", metrics={"recall_at_1": 0.5})


def test_folders_are_no_hub_ids(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert is_hub_id("llava-hf/llava-1.5-7b-hf") and is_hub_id("icons")
    for name in ("/home/me/model", "./out", "..", "a/b/c", "C:\\models", "tests", "", None):
        assert not is_hub_id(name), name
