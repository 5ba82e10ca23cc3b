"""Saves, loads and pushes the checkpoints of a training run."""

import logging
import math
import os
import shutil
import tempfile
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from huggingface_hub import HfApi, run_as_future, upload_folder
from huggingface_hub.constants import REPOCARD_NAME
from peft import PeftModel
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import PushInProgress

from ..hub.cards import CURVES_NAME
from ..hub.pushing import check_base_is_on_hub, check_is_private, push_checkpoint, pushed_files
from ..modeling import UniGDForConditionalGeneration
from ..modeling.save_folder_unigd import check_save_folder
from ..outputs import writing
from .adapters import save_adapter_companions
from .interruption import SaveOnSigterm, discard, is_whole, last_whole_checkpoint
from .output_folder import check_output_folder
from .run_card import make_run_card


logger = logging.getLogger(__name__)


class CheckpointingTrainer(Trainer):
    """A [`~transformers.Trainer`] whose checkpoints load as UniGD models. A checkpoint that cannot be saved completely
    is removed. The `output_dir` may hold earlier checkpoints of the same model, and is refused before training if it
    holds another model."""

    def __init__(self, *args, **kwargs):
        self.push_in_progress: PushInProgress | None = None
        self.resumed_from: str | None = None  # the checkpoint whose run is continued
        super().__init__(*args, **kwargs)
        self._save_on_sigterm = SaveOnSigterm(self.accelerator)
        self.add_callback(self._save_on_sigterm)

    def train(self, resume_from_checkpoint=None, **kwargs):
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir, self.args.should_save)
            if resume_from_checkpoint is None:
                raise ValueError(f"There is no complete checkpoint in {self.args.output_dir} to resume from.")
        self._check_save_folders(self.args.output_dir, *Path(self.args.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
        if resume_from_checkpoint is None and self.args.should_save:
            check_output_folder(self.args.output_dir)
        self.resumed_from = resume_from_checkpoint
        try:
            return super().train(resume_from_checkpoint, **kwargs)
        finally:
            self._save_on_sigterm.restore()
            self._finish_current_push()  # a push cannot finish once the process ends

    def _check_save_folders(self, *folders: str | Path) -> None:
        """
        Raises:
            FileExistsError: one of the folders holds another model ([`check_save_folder`]). What an interrupted save
                left of a checkpoint is no model.
        """
        for folder in map(Path, folders if self.args.should_save else ()):
            if is_whole(folder) or not folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
                check_save_folder(folder, self._unwrapped_model.config, isinstance(self.model, PeftModel))

    def _save_checkpoint(self, model, trial):
        # Only the final model is loaded again to verify it. Doing so for every checkpoint would cost too much.
        unwrapped = self._unwrapped_model
        verifies, unwrapped.verify_saves = unwrapped.verify_saves, False
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            name = f"checkpoint-{self.state.global_step}"
            if self.args.should_save:
                discard(Path(self.args.output_dir, name))
            raise RuntimeError(
                f"{name} could not be saved ({error}) and was removed. Earlier checkpoints in {self.args.output_dir} "
                "are complete. Check whether the disk is full."
            ) from error
        finally:
            unwrapped.verify_saves = verifies

    def _stop_at_non_finite_loss(self, loss: float, rows: list[int]) -> None:
        """Saves the state before this step, and raises on all processes. Each gives its loss and the rows of its
        batch."""
        self._save_checkpoint(self.model, trial=None)
        found = [(self.args.process_index, loss, rows)]
        not_finite = [entry for entry in gather_object(found) if not math.isfinite(entry[1])]
        listing = "; ".join(
            f"{value} on process {process}, in the batch of rows {rows}" for process, value, rows in not_finite
        )
        raise FloatingPointError(
            f"The loss is not finite at step {self.state.global_step} ({listing}). The state before this step was "
            f"saved to checkpoint-{self.state.global_step} in {self.args.output_dir}. Check these rows, lower the "
            "learning rate, or train in bfloat16 or float32."
        )

    @property
    def _unwrapped_model(self) -> UniGDForConditionalGeneration:
        """The model without adapter and wrappers."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if isinstance(model, PeftModel) else model

    def _save(self, output_dir=None, state_dict=None):
        if output_dir is None or Path(output_dir).resolve() == Path(self.args.output_dir).resolve():
            self._finish_current_push()  # it may still read the files that are overwritten here
        self._check_save_folders(output_dir or self.args.output_dir)
        super()._save(output_dir, state_dict)
        if not self.args.should_save:  # every process calls this, but only one writes
            return
        # Nothing reads the pickled arguments, and a push would publish the paths of this machine with them.
        Path(output_dir or self.args.output_dir, TRAINING_ARGS_NAME).unlink(missing_ok=True)
        if isinstance(self.model, PeftModel):
            save_adapter_companions(self.model, output_dir or self.args.output_dir)

    # Saving gives the backbone's tensors their native names, which only `from_pretrained` translates back. Trainer
    # reads the file itself, does not find these names in the model, and silently loads nothing.
    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self._loads_whole_models:
            self._load_whole_model(resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        if self._loads_whole_models:
            self._load_whole_model(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    @property
    def _loads_whole_models(self) -> bool:
        return not (isinstance(self.model, PeftModel) or self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _load_whole_model(self, folder) -> None:
        saved = type(self.model).from_pretrained(folder, dtype=self.model.vlm.dtype)
        self.model.load_state_dict(saved.state_dict())

    def create_model_card(self, model_name=None, tags=None, **kwargs):
        """Writes the model card of the run to `README.md`, and a figure of the losses. `kwargs` are passed to
        [`~hf_unigd.trainer.run_card.make_run_card`]."""
        if self.is_world_process_zero():
            card = make_run_card(self, **kwargs)
            card.data["tags"] += [tags] if isinstance(tags, str) else tags or []
            with writing(Path(self.args.output_dir, REPOCARD_NAME)) as file:
                card.save(file)

    def init_hf_repo(self, token=None, private=None):
        """Creates the repository before training.

        Raises:
            ValueError: the repository should be private, but exists and is public; or the model is an adapter whose
                base model is not on the Hub.
        """
        if isinstance(self.model, PeftModel):
            check_base_is_on_hub(self.model.peft_config[self.model.active_adapter].base_model_name_or_path)
        if not self.is_world_process_zero():
            return
        api = HfApi(token=token or self.args.hub_token)
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        private = self.args.hub_private_repo if private is None else private
        self.hub_model_id = api.create_repo(name, private=private, exist_ok=True).repo_id
        if private:
            check_is_private(api, self.hub_model_id)

    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None, **kwargs
    ):
        """Pushes as [`~transformers.Trainer.push_to_hub`] does, but with [`~hf_unigd.hub.pushing.push_checkpoint`],
        which leaves out logs and other files of the run. `kwargs` are passed to [`create_model_card`]."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self._finish_current_push()
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        given = {"token": token, "revision": revision, "private": private}
        job = self._push(self.args.output_dir, commit_message, given)
        self.push_in_progress = PushInProgress([job])
        return job.result() if blocking else job

    def _push(self, folder: str, commit_message: str, given: dict[str, Any]) -> Future:
        """Pushes a folder in the background. Values that are not `given` are taken from the arguments."""
        where = {
            "token": self.args.hub_token,
            "revision": self.args.hub_revision,
            "private": self.args.hub_private_repo,
            **{name: value for name, value in given.items() if value is not None},
        }
        return run_as_future(push_checkpoint, folder, self.hub_model_id, commit_message=commit_message, **where)

    def _push_from_checkpoint(self, checkpoint_folder):
        """Pushes the files that a user of this checkpoint needs, in the background. Trainer would leave some
        of them out, and push its arguments and logs."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self.args.hub_always_push:
            self._finish_current_push()
        elif self.push_in_progress is not None and not self.push_in_progress.is_done():
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        # The checkpoint may be rotated out before its upload is done, so a copy is uploaded.
        staged = tempfile.TemporaryDirectory(dir=self.args.output_dir, prefix="_push")
        try:
            jobs = self._push_staged(Path(checkpoint_folder), Path(staged.name))
        except Exception as error:  # the checkpoint is complete, so training continues
            logger.warning("checkpoint-%s was saved, but could not be pushed: %s", self.state.global_step, error)
            staged.cleanup()
            return
        jobs[-1].add_done_callback(lambda _: staged.cleanup())
        self.push_in_progress = PushInProgress(jobs)

    def _push_staged(self, checkpoint: Path, staged: Path) -> list[Future]:
        """Copies the files to push to `staged` and starts the uploads."""
        message = f"Training in progress, step {self.state.global_step}"
        model, state = staged / "model", staged / "state"
        for name in pushed_files(checkpoint) - {REPOCARD_NAME}:
            (model / name).parent.mkdir(parents=True, exist_ok=True)
            _link(checkpoint / name, model / name)
        self.create_model_card()
        for name in (REPOCARD_NAME, CURVES_NAME):
            if (written := Path(self.args.output_dir, name)).is_file():
                shutil.copy(written, model)
        jobs = [self._push(str(model), message, {})]
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            shutil.copytree(checkpoint, state, copy_function=_link)
            is_last = self.args.hub_strategy == HubStrategy.CHECKPOINT
            upload = partial(
                upload_folder,
                repo_id=self.hub_model_id,
                folder_path=state,
                path_in_repo="last-checkpoint" if is_last else checkpoint.name,
                commit_message=f"{message}, training state",
                revision=self.args.hub_revision,
                token=self.args.hub_token,
            )
            jobs.append(run_as_future(upload))  # the client runs one job at a time, in order
        for job in jobs:
            job.add_done_callback(_warn_if_failed)
        return jobs


def _link(file, target) -> None:
    """Links a file that is not written to any more, or copies it if the file system has no links."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copy(file, target)


def _warn_if_failed(job: Future) -> None:
    if error := job.exception():
        logger.warning("A push during training failed; training continues. %s", error)
