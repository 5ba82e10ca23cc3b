"""Callbacks of [`UniGDTrainer`]."""

from typing import Any

from transformers import TrainerCallback

from .sampler import EpochSampler
from .vision_cache import VisionFeatureCache


class ClampLogitScale(TrainerCallback):
    """Clamps `logit_scale` after each optimizer step, as CLIP does."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        model.clamp_logit_scale_()


class KeepImageFeatures(TrainerCallback):
    """Writes the features of images whenever a run may end or the workers of a data loader start.

    Attributes:
        cache: The features, once there are some.
    """

    def __init__(self) -> None:
        self.cache: VisionFeatureCache | None = None

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.cache is not None:
            self.cache.flush()

    on_save = on_train_end = on_evaluate = on_predict = on_epoch_end


class SetEpoch(TrainerCallback):
    """Sets the epoch of the examples and of their sampler, because accelerate does not if it shards the batch sampler
    across processes.

    Attributes:
        sampler: The sampler of the training data, if it has an epoch.
    """

    def __init__(self) -> None:
        self.sampler: EpochSampler | None = None

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        # `state.epoch` is a fraction of steps, so it may be 2.9999999 at the start of the fourth epoch.
        epoch = int(state.epoch + 1e-6)
        parts: list[Any] = [getattr(train_dataloader, "dataset", None), self.sampler]
        for part in parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
