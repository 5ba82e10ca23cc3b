"""The quickstart in small: every file and number it promises, in a few steps."""

import json

import pytest
import yaml

from hf_unigd.cli.main import main
from hf_unigd.quickstart import run as quickstart
from hf_unigd.quickstart import sugar


def test_it_writes_what_it_promises(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quickstart, "VIEWS", 1)
    main(["quickstart", "--output", str(tmp_path), "--max_steps", "3", "--batch_size", "16"])
    printed = capsys.readouterr().out
    assert "text to image, R@1" in printed and "Reloaded in a fresh process without hf-unigd" in printed
    assert printed.count("    -> ") == 3
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["chance"]["positive_to_anchor_recall_at_10"] == 0.01
    assert metrics["after"]["perplexity"] < metrics["before"]["perplexity"]
    assert (tmp_path / "retrieval.png").stat().st_size > 10_000
    assert (tmp_path / "model.safetensors").is_file() and (tmp_path / "modeling_unigd.py").is_file()

    card = (tmp_path / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["library_name"] == "transformers" and metadata["pipeline_tag"] == "image-text-to-text"
    reported = {part["type"]: part["value"] for part in metadata["model-index"][0]["results"][0]["metrics"]}
    assert reported["perplexity"] == pytest.approx(metrics["after"]["perplexity"], abs=1e-3)
    assert f'from_pretrained("{tmp_path}", trust_remote_code=True)' in card


def test_a_checkpoint_that_differs_in_a_fresh_process_is_reported(tmp_path, monkeypatch, llava):
    model, processor = llava
    rows = quickstart.load_icons("test", size=16)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    quickstart.check_in_fresh_process(model, processor, rows, tmp_path)
    model.vlm.get_input_embeddings().weight.data *= 1.5
    with pytest.raises(RuntimeError, match="A fresh process finds a similarity of"):
        quickstart.check_in_fresh_process(model, processor, rows, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(RuntimeError, match="does not load in a fresh process"):
        quickstart.check_in_fresh_process(model, processor, rows, tmp_path)


def test_the_sugar_recipe_compares_with_and_without_the_structure_loss(tmp_path, capsys, monkeypatch):
    for name, value in (("STORIES", 40), ("TEST_STORIES", 20), ("CAST", 20), ("CLIP_STEPS", 2)):
        monkeypatch.setattr(sugar, name, value)
    main(["quickstart", "--recipe", "sugar", "--output", str(tmp_path), "--max_steps", "2", "--batch_size", "4"])
    printed = capsys.readouterr().out
    assert "five captions, four pictures, R@10" in printed
    assert "Reloaded in a fresh process without hf-unigd" in printed
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["with_structure"] != metrics["without_structure"]
    assert set(metrics["before"]) == set(metrics["with_structure"])
    processor = json.loads((tmp_path / "processor_config.json").read_text())
    assert processor["embedding_position"] == "last_slice"
    assert "(Sugar)" in (tmp_path / "README.md").read_text()


def test_an_unknown_recipe_is_refused():
    with pytest.raises(SystemExit):
        main(["quickstart", "--recipe", "unknown"])
