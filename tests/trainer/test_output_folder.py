"""Which output folders a run goes into, and that what it saves there has digests."""

import shutil

import pytest
from peft import LoraConfig

from hf_unigd.hub import load_checkpoint
from tiny_models import make_vlm
from trainer_cases import make_trainer


SETTINGS = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
LORA = LoraConfig(r=2, target_modules=["q_proj"])


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_run_goes_into_the_folder_of_an_earlier_run_of_the_same_model(tmp_path):
    for _ in range(2):
        trainer = make_trainer(tmp_path, **SETTINGS)
        trainer.train()
        trainer.save_model()
    for name in (tmp_path, tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"):
        load_checkpoint(str(name), verify="digests")


def test_adapters_go_over_earlier_ones_and_over_what_an_interrupted_save_left(tmp_path):
    # The base model was made in memory, so the adapters name none, and only their saving is tested.
    make_trainer(tmp_path, peft_config=LORA, **SETTINGS).train()
    for left in ("config.json", "trainer_state.json"):
        (tmp_path / "checkpoint-2" / left).unlink()
    trainer = make_trainer(tmp_path, peft_config=LORA, **SETTINGS)
    trainer.train()
    for _ in range(2):
        trainer.save_model()
    for name in (tmp_path, tmp_path / "checkpoint-2"):
        assert (name / "digests.json").is_file() and (name / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("place", [".", "checkpoint-1"])
@pytest.mark.parametrize("is_adapter", [True, False])
def test_another_models_folder_is_refused_before_training(tmp_path, place, is_adapter):
    make_vlm().model.save_pretrained(tmp_path / place)
    (tmp_path / place / "trainer_state.json").write_text("{}")
    before = contents(tmp_path)
    trainer = make_trainer(tmp_path, peft_config=LORA if is_adapter else None, **SETTINGS)
    with pytest.raises(FileExistsError, match="holds a whole model" if is_adapter else "`model_type` is 'llava'"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert contents(tmp_path) == before


def test_a_save_into_another_models_folder_is_refused(tmp_path):
    make_vlm().model.save_pretrained(tmp_path / "plain")
    before = contents(tmp_path / "plain")
    for peft_config in (None, LORA):
        trainer = make_trainer(tmp_path / "out", peft_config=peft_config)
        with pytest.raises(FileExistsError, match="Nothing was written"):
            trainer.save_model(tmp_path / "plain")
        assert contents(tmp_path / "plain") == before
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
