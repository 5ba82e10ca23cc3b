"""Both recipes in a few steps: every file and number that they promise."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image as PILImage
from safetensors.torch import load_file
from transformers import BatchFeature

from hf_unigd.cli.main import main
from hf_unigd.data import load_icons, load_scenes
from hf_unigd.quickstart import scenes, sugar, vladva
from hf_unigd.quickstart.fresh_process import check_in_fresh_process
from hf_unigd.quickstart.training import fast_matrix_products


def test_the_vladva_recipe_writes_what_it_promises(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(vladva, "VIEWS", 1)
    monkeypatch.setattr(vladva, "ASKED", 6)
    make_trainer, mixtures = vladva.make_trainer, []

    def recorded(args, model, processor, train, *others, **recipe):
        mixtures.append(train)
        return make_trainer(args, model, processor, train, *others, **recipe)

    monkeypatch.setattr(vladva, "make_trainer", recorded)
    main(["quickstart", "--output", str(tmp_path), "--max_steps", "3", "--batch_size", "16"])
    printed = capsys.readouterr().out
    assert [source.name for source in mixtures[0].sources] == ["icons", "questions", "searches"]
    assert mixtures[0].sources[2].rows[0].keys() == {"anchor", "positive"}
    assert "text to image, R@1" in printed and "Reloaded in a fresh process without hf-unigd" in printed
    assert printed.count("    -> ") == 6 and "Of all 1000, " in printed and "answers about 6 of these icons" in printed
    assert f"hf-unigd index --model {tmp_path} --dataset_name icons" in printed
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["chance"]["positive_to_anchor_recall_at_10"] == 0.01
    assert metrics["after"]["perplexity"] < metrics["before"]["perplexity"]
    assert 0 <= metrics["after"]["answers_all_with_retrieval"] <= 1
    assert (tmp_path / "retrieval.png").stat().st_size > 10_000
    icon = PILImage.open(tmp_path / "icon.png").convert("RGB")
    assert icon.tobytes() == load_icons("test", size=vladva.IMAGE_SIZE)[0]["image"].tobytes()
    assert f"hf-unigd serve --model {tmp_path} --index icons_index" in printed
    assert f"hf-unigd answer icons_index --image {tmp_path / 'icon.png'}" in printed
    assert (tmp_path / "model.safetensors").is_file() and (tmp_path / "modeling_unigd.py").is_file()

    card = (tmp_path / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["library_name"] == "transformers" and metadata["pipeline_tag"] == "image-text-to-text"
    reported = {part["type"]: part["value"] for part in metadata["model-index"][0]["results"][0]["metrics"]}
    assert reported["perplexity"] == pytest.approx(metrics["after"]["perplexity"], abs=1e-3)
    assert f'from_pretrained("{tmp_path}", trust_remote_code=True)' in card


def test_captions_are_scored_by_the_words_that_they_name():
    captions = [
        "arrow up bold, a small red icon.",  # every word, in another order
        "arrow, a small red icon.",
        "bold arrow",
        "size idd",
    ]
    found = vladva.caption_accuracy(captions, ["arrow_bold_up", "arrow_left", "arrow_bold_up", "size"])
    assert found == {"captions_with_the_first_word": 0.75, "captions_with_all_words": 0.25}


def test_training_alone_multiplies_matrices_in_bfloat16():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(ZeroDivisionError), fast_matrix_products():
        assert torch.get_float32_matmul_precision() == "medium"
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == before != "medium"


def test_a_checkpoint_that_differs_in_a_fresh_process_is_reported(tmp_path, monkeypatch, llava):
    model, processor = llava
    row = load_icons("test", size=16)[0]
    inputs = row["image"], row["short_caption"], tmp_path
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    image, text = model.embed(**processor.process_sequences([[row["image"]], row["short_caption"]]))
    assert check_in_fresh_process(model, processor, *inputs) == pytest.approx((image @ text).item(), abs=1e-4)
    model.vlm.get_input_embeddings().weight.data *= 1.5
    with pytest.raises(RuntimeError, match="The similarity in a fresh process is"):
        check_in_fresh_process(model, processor, *inputs)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(RuntimeError, match="does not load in a fresh process"):
        check_in_fresh_process(model, processor, *inputs)
    assert not (tmp_path / "query.png").exists()


def test_the_sugar_recipe_compares_with_and_without_the_structure_loss(tmp_path, capsys, monkeypatch):
    for name, value in (("STORIES", 40), ("TEST_STORIES", 20), ("CAST", 20), ("CLIP_STEPS", 2)):
        monkeypatch.setattr(sugar, name, value)
    make_trainer, initial, trainers = sugar.make_trainer, [], []

    def recorded(model, *args, **kwargs):
        initial.append(copy.deepcopy(model.embedding_head.state_dict()))
        trainers.append(make_trainer(model, *args, **kwargs))
        return trainers[-1]

    monkeypatch.setattr(sugar, "make_trainer", recorded)
    main(["quickstart", "--recipe", "sugar", "--output", str(tmp_path), "--max_steps", "2", "--batch_size", "4"])
    printed = capsys.readouterr().out
    assert "five captions, four images, R@10" in printed
    assert "Reloaded in a fresh process without hf-unigd" in printed
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert set(metrics["before"]) == set(metrics["without_structure"]) == set(metrics["with_structure"])
    # Both arms start from the same head, which the structure loss alone trains, and the arm with it is saved.
    same, other = initial
    assert all(torch.equal(tensor, other[name]) for name, tensor in same.items())
    without, with_structure = (trainer.model.embedding_head.projection.state_dict() for trainer in trainers)
    saved = load_file(tmp_path / "model.safetensors")
    for name, tensor in with_structure.items():
        start = same[f"projection.{name}"]
        # Steps are at least 1e-4 long here; without the loss there is weight decay alone, of matrices.
        decay = (without[name] * start).sum() / (start * start).sum() if start.ndim > 1 else 1.0
        assert 0.999 < decay <= 1 and torch.allclose(without[name], decay * start, rtol=1e-6, atol=1e-8), name
        assert (tensor - start).abs().max() > 3e-5, name
        assert torch.equal(saved[f"embedding_head.projection.{name}"], tensor), name
    processor = json.loads((tmp_path / "processor_config.json").read_text())
    assert processor["embedding_position"] == "last_slice"
    assert "(Sugar)" in (tmp_path / "README.md").read_text()


def test_the_scenes_recipe_measures_hard_negatives_and_answers(tmp_path, capsys, monkeypatch):
    def load_few(split, configuration="retrieval", count=84, **settings):
        return load_scenes(split, configuration, min(count, 84), **settings)

    monkeypatch.setattr(scenes, "load_scenes", load_few)
    main(["quickstart", "--recipe", "scenes", "--output", str(tmp_path), "--max_steps", "3", "--batch_size", "16"])
    printed = capsys.readouterr().out
    assert "sugarcrepe swap att" in printed and "pope adversarial" in printed
    assert "Reloaded in a fresh process without hf-unigd" in printed
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert set(metrics["chance"]) == set(metrics["after"]) - {"perplexity"} == set(metrics["before"]) - {"perplexity"}
    assert len([name for name in metrics["chance"] if name.startswith("sugarcrepe_")]) == 7
    assert metrics["after"]["perplexity"] < metrics["before"]["perplexity"]
    assert "(VladVA)" in (tmp_path / "README.md").read_text()


def test_scenes_are_scored_by_kind_and_category(monkeypatch):
    rows = load_scenes("test", "sugarcrepe")
    right, kinds = {row["caption"] for row in rows.with_format(None)}, rows.with_format(None)["kind"]

    def embed(model, processor, sequences, *args, **kwargs):
        """Finds every right caption; a wrong one too, where something is added."""
        if not isinstance(sequences[0], str):
            return torch.ones(len(sequences), 1)
        return torch.tensor([[float(text in right or " and " in text)] for text in sequences])

    monkeypatch.setattr(scenes, "embed_sequences", embed)
    found = scenes.negatives_accuracy(None, None)
    assert set(kinds) == {name.removeprefix("sugarcrepe_") for name in found}
    assert found["sugarcrepe_add_obj"] == 0 and found["sugarcrepe_replace_obj"] > 0.9


def test_generated_answers_are_compared_with_the_right_ones():
    class Processor:
        def process_sequences(self, sequences, prompted, padding_side):
            assert not prompted and padding_side == "left"
            return BatchFeature({"input_ids": torch.zeros(len(sequences), 3, dtype=torch.long)})

        def batch_decode(self, tokens, skip_special_tokens):
            assert tokens.shape[1] == 2 and (tokens == 7).all()
            return [" yes"] * len(tokens)

    def generate(input_ids, **settings):
        return torch.nn.functional.pad(input_ids, (0, 2), value=7)

    model = SimpleNamespace(device="cpu", generate=generate)
    found = scenes.answers_accuracy(model, Processor())
    assert found == {"pope_random": 0.5, "pope_popular": 0.5, "pope_adversarial": 0.5}


def test_an_unknown_recipe_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["quickstart", "--recipe", "unknown"])
    assert "argument --recipe: invalid choice: 'unknown'" in capsys.readouterr().err
