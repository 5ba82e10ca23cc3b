"""Features of a frozen vision tower are computed once per step, or only once if they are kept on disk."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers.utils import ModelOutput

from hf_unigd.trainer.vision import join_images, split_images
from trainer_cases import make_rows, make_trainer


def train(folder, **kwargs):
    """Returns the logged losses, and the number of forward passes of the vision tower."""
    trainer = make_trainer(folder / "out", **kwargs)
    base = trainer.model.vlm.model
    tower = base.vision_tower if hasattr(base, "vision_tower") else base.visual
    passes = []
    tower.register_forward_hook(lambda *_: passes.append(1))
    trainer.train()
    losses = [
        (entry["contrastive_loss"], entry["causal_lm_loss"]) for entry in trainer.state.log_history if "loss" in entry
    ]
    return losses, len(passes)


@pytest.mark.parametrize("family", ["llava_next", "qwen3_vl"])
def test_a_frozen_tower_runs_once_per_chunk_for_both_passes(tmp_path, family):
    """There are 4 steps of 4 images in chunks of 2. A trained tower runs in both passes of each chunk."""
    settings = {"family": family, "gradient_cache_chunk_size": 2, "max_steps": 4}
    losses, passes = train(tmp_path, **settings)
    assert passes == 4 * 2
    plain, passes = train(tmp_path, family=family, max_steps=4)
    assert passes == 4
    assert torch.allclose(torch.tensor(losses), torch.tensor(plain), rtol=1e-4)
    _, passes = train(tmp_path, **settings, freeze_vision_tower=False)
    assert passes == 4 * 2 * 2


@pytest.mark.parametrize("family", ["llava_onevision", "qwen3_vl", "gemma3"])
def test_features_on_disk_replace_the_tower_without_changing_the_losses(tmp_path, family):
    settings = {"family": family, "max_steps": 8, "vision_cache": str(tmp_path / "cache")}
    losses, passes = train(tmp_path, **settings)
    assert passes == 4  # 16 images, 4 per step: the second epoch reads all features from disk, in other batches
    again, passes = train(tmp_path, **settings, gradient_cache_chunk_size=3)
    assert passes == 0
    assert torch.allclose(torch.tensor(again), torch.tensor(losses), rtol=1e-4)
    uncached, _ = train(tmp_path, family=family, max_steps=8)
    assert torch.equal(torch.tensor(uncached), torch.tensor(losses))


def test_features_of_another_tower_and_incomplete_files_are_not_read(tmp_path):
    settings = {"max_steps": 4, "vision_cache": str(tmp_path / "cache")}
    losses, _ = train(tmp_path, **settings)
    for file in (tmp_path / "cache").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-7])
    again, passes = train(tmp_path, **settings)
    assert passes == 4 and again == losses
    trainer = make_trainer(tmp_path / "out", **settings)
    with torch.no_grad():
        next(trainer.model.vlm.model.vision_tower.parameters()).mul_(1.01)
    trainer.train()
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_features_of_every_form_are_divided_into_images_and_joined_again():
    """A list of images, tiles of 4 tokens, tokens, and layers of tokens, of images of 8, 4 and 12 tokens."""
    lengths = [8, 4, 12]
    forms = {
        "list": [torch.randn(length, 3) for length in lengths],
        "tiles": torch.randn(6, 4, 3),
        "tokens": torch.randn(24, 3),
    }
    layers = [torch.randn(24, 3) for _ in range(12)]
    for pooled in forms.values():
        features = ModelOutput(pooler_output=pooled, deepstack_features=layers)
        images = split_images(features, lengths)
        joined = join_images([dict(sorted(images[place].items())) for place in (2, 0)])
        expected = [split_images(features, lengths)[place] for place in (2, 0)]
        whole = joined.pooler_output if isinstance(pooled, list) else [joined.pooler_output]
        assert isinstance(joined.pooler_output, list) == isinstance(pooled, list)
        assert torch.equal(torch.cat(list(whole)), torch.cat([next(iter(image.values())) for image in expected]))
        again = join_images(images)
        assert all(torch.equal(*pair) for pair in zip(again.deepstack_features, layers, strict=True))
        assert torch.equal(torch.cat(list(again.pooler_output)), torch.cat(list(pooled)))


@pytest.mark.parametrize("pooled", [[torch.zeros(8, 3)], torch.zeros(11, 3), torch.zeros(2, 6, 3)])
def test_features_that_cannot_be_divided_into_images_are_refused(pooled):
    with pytest.raises(
        ValueError, match=r"(?s)`vision_cache` cannot store `pooler_output` .* 2 images of \[8, 4\] tokens"
    ):
        split_images(ModelOutput(pooler_output=pooled), [8, 4])


def test_text_rows_write_no_features(tmp_path):
    rows = Dataset.from_dict(
        {"anchor": [f"question {n}" for n in range(8)], "positive": [f"answer {n}" for n in range(8)]}
    )
    trainer = make_trainer(tmp_path, rows, vision_cache=str(tmp_path / "cache"), max_steps=2)
    trainer.train()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_vision_cache_with_a_trained_tower_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`vision_cache` keeps the features of a frozen vision tower"):
        make_trainer(tmp_path, freeze_vision_tower=False, vision_cache=str(tmp_path))
    in_tower = LoraConfig(r=2, target_modules=r".*vision_tower.*q_proj", task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="keep LoRA out of the tower"):
        make_trainer(tmp_path, make_rows(8), peft_config=in_tower, vision_cache=str(tmp_path))
