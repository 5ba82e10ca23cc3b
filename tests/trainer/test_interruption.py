"""Failed saves, SIGTERM, and the checkpoint that a run resumes from."""

import os
import signal

import pytest
from transformers import TrainerCallback

from hf_unigd import UniGDForConditionalGeneration
from hf_unigd.trainer.interruption import last_whole_checkpoint
from trainer_cases import make_trainer


SETTINGS = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path):
    class FillDisk(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                (tmp_path / "checkpoint-4").mkdir()
                (tmp_path / "checkpoint-4" / "optimizer.pt").symlink_to("/dev/full")  # no space left on device

    trainer = make_trainer(tmp_path, save_total_limit=1, **SETTINGS)
    trainer.add_callback(FillDisk())
    with pytest.raises(RuntimeError, match="checkpoint-4 could not be saved"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    UniGDForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-2")
    resumed = make_trainer(tmp_path, **SETTINGS)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6


def test_a_signal_while_saving_takes_effect_after_the_next_step(tmp_path):
    """Processes exchange the signal at the end of a step. If one exited at once, the others would wait for it."""

    class Terminate(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    trainer = make_trainer(tmp_path, **SETTINGS)
    trainer.callback_handler.callbacks.insert(0, Terminate())
    with pytest.raises(SystemExit) as stop:
        trainer.train()
    assert stop.value.code == 128 + signal.SIGTERM
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")


def test_resuming_skips_and_removes_incomplete_checkpoints(tmp_path):
    make_trainer(tmp_path, **SETTINGS).train()
    (tmp_path / "checkpoint-6" / "trainer_state.json").unlink()  # written last
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text('{"epoch": 1.')
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    resumed = make_trainer(tmp_path, save_total_limit=1, **SETTINGS)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]


def test_resuming_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no complete checkpoint in"):
        make_trainer(tmp_path / "empty").train(resume_from_checkpoint=True)
