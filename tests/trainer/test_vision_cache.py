"""Features of a frozen vision tower are computed once per step, or only once if they are kept on disk."""

import logging
import pickle
import shutil
from collections import namedtuple

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers.utils import ModelOutput

from hf_unigd import UniGDProcessor
from hf_unigd.bulk.image_features import join_images, split_images
from hf_unigd.trainer.stored_images import without_pixels
from tiny_models import make_image, make_vlm
from trainer_cases import make_args, make_rows, make_trainer


def train(folder, pixels=None, resume=None, **kwargs):
    """Returns the logged losses, and the number of forward passes of the vision tower. Whether each batch had the
    pixels of its images is appended to `pixels`."""
    trainer = make_trainer(folder / "out", **kwargs)
    if pixels is not None:
        step = trainer.training_step

        def record(model, inputs, *args):
            pixels.append(any("pixel_values" in chunk for chunk in inputs["chunks"]))
            return step(model, inputs, *args)

        trainer.training_step = record
    base = trainer.model.vlm.model
    tower = base.vision_tower if hasattr(base, "vision_tower") else base.visual
    passes = []
    tower.register_forward_hook(lambda *_: passes.append(1))
    trainer.train(resume_from_checkpoint=resume)
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


@pytest.mark.parametrize(
    ("family", "by_size"), [("llava_onevision", False), ("qwen3_vl", True), ("gemma3", True), ("llava_next", True)]
)
@pytest.mark.parametrize("workers", [0, 2])
def test_features_on_disk_replace_the_tower_without_changing_the_losses(tmp_path, family, by_size, workers):
    """16 images, 4 per step: the second epoch reads all features from disk, in other batches."""
    pixels = []
    settings = {"family": family, "max_steps": 8, "vision_cache": str(tmp_path / "cache")}
    losses, passes = train(tmp_path, pixels, dataloader_num_workers=workers, **settings)
    assert passes == 4
    assert pixels == [True] * 4 + [not by_size] * 4
    uncached, _ = train(tmp_path, family=family, max_steps=8)
    assert torch.equal(torch.tensor(uncached), torch.tensor(losses))
    if not workers:
        again, passes = train(tmp_path, **settings, gradient_cache_chunk_size=3)
        assert passes == 0
        assert torch.allclose(torch.tensor(again), torch.tensor(losses), rtol=1e-4)


def test_a_resumed_run_goes_on_with_the_stored_features(tmp_path):
    settings = {"max_steps": 8, "vision_cache": str(tmp_path / "cache"), "save_strategy": "steps", "save_steps": 3}
    losses, _ = train(tmp_path, **settings)
    for number in (6, 8):
        shutil.rmtree(tmp_path / "out" / f"checkpoint-{number}")
    resumed, passes = train(tmp_path, resume=True, **settings)
    assert passes == 2  # of the probes of the two checkpoints that follow
    assert resumed[-5:] == losses[-5:]


def test_features_in_a_smaller_type_are_the_same_in_every_epoch(tmp_path):
    settings = {"max_steps": 4, "learning_rate": 1e-9, "vision_cache": str(tmp_path / "cache")}
    whole, _ = train(tmp_path, **settings)
    first, passes = train(tmp_path, **settings, vision_cache_dtype="bfloat16")
    assert passes == 4 and first != whole
    assert torch.allclose(torch.tensor(first), torch.tensor(whole), rtol=1e-2)
    again, passes = train(tmp_path, **settings, vision_cache_dtype="bfloat16")
    assert passes == 0 and again == first
    sizes = sorted(sum(file.stat().st_size for file in folder.iterdir()) for folder in (tmp_path / "cache").iterdir())
    assert sizes[0] < 0.7 * sizes[1]


def test_the_type_of_the_features_is_checked(tmp_path):
    with pytest.raises(ValueError, match="`vision_cache_dtype=int8` must be one of bfloat16, float16"):
        make_args(tmp_path, vision_cache="cache", vision_cache_dtype="int8")
    with pytest.raises(ValueError, match="no effect without `vision_cache`"):
        make_args(tmp_path, vision_cache_dtype="float16")


def test_the_space_is_estimated_before_anything_is_written(tmp_path, monkeypatch, caplog):
    """16 images of 4 tokens of 32 float32 values take 8,192 bytes."""
    usage = namedtuple("usage", "free")
    for free in (8191, 8192):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=free: usage(free))
        trainer = make_trainer(tmp_path / "out", max_steps=4, vision_cache=str(tmp_path / str(free)))
        if free < 8192:
            with pytest.raises(OSError, match=r"(?s)for about 16 images. .* Name a folder on a larger disk"):
                trainer.train()
            assert not list((tmp_path / str(free)).rglob("*.safetensors"))
        else:
            with caplog.at_level(logging.WARNING):
                trainer.train()
            assert "`vision_cache` takes 0.00051 MB an image, 0.0 GB for about 16 images" in caplog.text


def test_features_that_are_lost_while_a_batch_is_made_are_named(tmp_path):
    settings = {"max_steps": 4, "vision_cache": str(tmp_path / "cache")}
    train(tmp_path, **settings)
    trainer = make_trainer(tmp_path / "out", **settings)
    step = trainer.training_step

    def lose(model, inputs, *args):
        for file in (tmp_path / "cache").rglob("*.safetensors"):
            file.unlink()
        return step(model, inputs, *args)

    trainer.training_step = lose
    with pytest.raises(RuntimeError, match=r"`vision_cache` has lost features of the images \['[0-9a-f]{32}'"):
        trainer.train()


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl", "internvl", "pixtral"])
def test_inputs_without_pixels_are_those_with_them(family):
    processor = UniGDProcessor(make_vlm(family).processor)
    sizes_alone = without_pixels(processor)
    if family == "llava":  # the other processors are of classes that cannot be pickled, made in the tests
        sizes_alone = pickle.loads(pickle.dumps(sizes_alone))  # as a worker that is spawned gets it
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        sizes = torch.randint(8, 400, (4, 2), generator=generator).tolist()
        a, b, c, d = (make_image(number, tuple(size)) for number, size in enumerate(sizes))
        sequences, targets = [[a], ["a cat", b, "and", c], "a dog", [d, "what is it"]], ["one", None, None, "two"]
        settings = {"sentence_ends": lambda text: [len(text)], "image_lengths": True, "padding_side": "left"}
        expected, made = (each.process_sequences(sequences, targets, **settings) for each in (processor, sizes_alone))
        assert expected.keys() == made.keys()
        for name in expected.keys() - {"pixel_values"}:
            assert torch.equal(expected[name], made[name]), name
        if family == "llava":  # other processors pad them
            assert made["pixel_values"].untyped_storage().nbytes() == 4


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
