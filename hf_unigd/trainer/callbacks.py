"""What [`UniGDTrainer`] does between steps and epochs."""

from typing import Any

from transformers import TrainerCallback


class ClampLogitScale(TrainerCallback):
    """Limits the temperature after each optimizer step, as CLIP does."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        model.clamp_logit_scale_()


class SetEpoch(TrainerCallback):
    """Tells the examples and their sampler which epoch it is; accelerate forgets to where a batch sampler is split
    among processes."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        # `state.epoch` counts steps as fractions: 2.9999999 is the third epoch's end and the fourth's beginning.
        epoch = int(state.epoch + 1e-6)
        parts: list[Any] = [getattr(train_dataloader, "dataset", None), self.trainer._epoch_sampler]
        for part in parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
