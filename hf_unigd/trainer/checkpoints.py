"""Checkpoints of a training run: written whole, read back exactly, and pushed."""

import logging
import shutil
from concurrent.futures import Future
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.constants import REPOCARD_NAME
from peft import PeftModel
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from ..hub.pushing import check_base_is_on_hub, push_checkpoint, pushed_files
from ..hub.runs import make_run_card
from ..modeling import UniGDForConditionalGeneration
from .adapters import save_adapter_companions
from .interruption import SaveOnSigterm, discard, last_whole_checkpoint


logger = logging.getLogger(__name__)


class CheckpointingTrainer(Trainer):
    """A [`~transformers.Trainer`] whose checkpoints are whole checkpoints of a UniGD model, or not there."""

    def __init__(self, *args, **kwargs):
        self.push_in_progress: PushInProgress | None = None
        super().__init__(*args, **kwargs)
        if self.args.push_to_hub and isinstance(self.model, PeftModel):
            check_base_is_on_hub(self.model.peft_config[self.model.active_adapter].base_model_name_or_path)
        self._save_on_sigterm = SaveOnSigterm(self.accelerator)
        self.add_callback(self._save_on_sigterm)

    def train(self, resume_from_checkpoint=None, **kwargs):
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir, self.args.should_save)
            if resume_from_checkpoint is None:
                raise ValueError(f"There is no checkpoint in {self.args.output_dir} to resume from.")
        try:
            return super().train(resume_from_checkpoint, **kwargs)
        finally:
            self._save_on_sigterm.restore()

    def _save_checkpoint(self, model, trial):
        # What a run leaves behind is opened again after saving; for every checkpoint that would cost too much.
        unwrapped = self._unwrapped_model
        unwrapped.verify_saves = False
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            name = f"checkpoint-{self.state.global_step}"
            if self.args.should_save:
                discard(Path(self.args.output_dir, name))
            raise RuntimeError(
                f"{name} could not be saved ({error}) and is removed; earlier checkpoints in {self.args.output_dir} "
                "are whole. Is the disk full?"
            ) from error
        finally:
            unwrapped.verify_saves = True

    @property
    def _unwrapped_model(self) -> UniGDForConditionalGeneration:
        """The model itself, without adapter or wrappers."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if isinstance(model, PeftModel) else model

    def _save(self, output_dir=None, state_dict=None):
        if output_dir in (None, self.args.output_dir):
            self._finish_current_push()  # of what is about to be overwritten
        super()._save(output_dir, state_dict)
        if not self.args.should_save:  # every process comes here, and one writes
            return
        # Pickled arguments, which nobody reads again: with this machine's paths, they would be pushed.
        Path(output_dir or self.args.output_dir, TRAINING_ARGS_NAME).unlink(missing_ok=True)
        if isinstance(self.model, PeftModel):
            save_adapter_companions(self.model, output_dir or self.args.output_dir)

    # Saving gives a backbone's tensors their native names, which only `from_pretrained` translates back: Trainer reads
    # the file itself, finds no such names in the model, and leaves the weights as they are without a word.
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
        """Writes `README.md`, of what the run knows, and the losses as a picture. `kwargs` are those of
        [`~hf_unigd.hub.make_run_card`]."""
        if self.is_world_process_zero():
            card = make_run_card(self, **kwargs)
            card.data["tags"] += [tags] if isinstance(tags, str) else tags or []
            card.save(Path(self.args.output_dir, REPOCARD_NAME))

    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None, **kwargs
    ):
        """As [`~transformers.Trainer.push_to_hub`], but with [`~hf_unigd.hub.pushing.push_checkpoint`]: logs and what
        else the run left in the folder stay behind. `kwargs` are those of [`create_model_card`]."""
        token = token or self.args.hub_token
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        push = partial(
            self._push_output,
            commit_message,
            private=self.args.hub_private_repo if private is None else private,
            revision=revision or self.args.hub_revision,
            token=token,
        )
        return push() if blocking else HfApi().run_as_future(push)

    def _push_output(self, commit_message, **kwargs):
        return push_checkpoint(self.args.output_dir, self.hub_model_id, commit_message=commit_message, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder):
        """Pushes, in the background, what a user of this checkpoint needs; Trainer pushes files that load nowhere, its
        arguments and its logs."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self.args.hub_always_push:
            self._finish_current_push()
        elif self.push_in_progress is not None and not self.push_in_progress.is_done():
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        api = HfApi()  # whose jobs run one after the other
        where = {"revision": self.args.hub_revision, "token": self.args.hub_token}
        message = f"Training in progress, step {self.state.global_step}"
        # Copied, as the checkpoint may make way for a newer one before its upload is done.
        for name in pushed_files(checkpoint_folder) - {REPOCARD_NAME}:
            shutil.copy(Path(checkpoint_folder, name), Path(self.args.output_dir, name))
        self.create_model_card()
        jobs = [api.run_as_future(self._push_output, message, **where)]
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            is_last = self.args.hub_strategy == HubStrategy.CHECKPOINT
            upload = api.upload_folder(
                repo_id=self.hub_model_id,
                folder_path=checkpoint_folder,
                path_in_repo="last-checkpoint" if is_last else Path(checkpoint_folder).name,
                commit_message=f"{message}, to resume from",
                run_as_future=True,
                **where,
            )
            jobs.append(upload)
        for job in jobs:
            job.add_done_callback(_warn_if_failed)
        self.push_in_progress = PushInProgress(jobs)


def _warn_if_failed(job: Future) -> None:
    if error := job.exception():
        logger.warning("A push during training failed; training goes on, and pushes again. %s", error)
