"""Callbacks of [`UniGDTrainer`]."""

from typing import Any

from transformers import TrainerCallback
from transformers.utils import logging

from .sampler import EpochSampler
from .vision_cache import VisionFeatureCache


logger = logging.get_logger(__name__)


class ClampLogitScale(TrainerCallback):
    """Clamps `logit_scale` after each optimizer step, as CLIP does."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        model.clamp_logit_scale_()


class WarnOfPlateau(TrainerCallback):
    """Warns once if the contrastive loss stays at the level of chance: matching pairs score no higher than others.

    Embeddings that are all alike have almost no gradient, so a model with a new projector or head can stay there for
    hundreds of steps, and others never leave.
    """

    patience = 200  # steps, as logged
    margin = 0.2  # by which the logits of matching pairs exceed the others, in nats

    def __init__(self) -> None:
        self._since: int | None = None
        self._warned = False

    def on_train_begin(self, args, state, control, **kwargs):
        self._since, self._warned = None, False

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._warned or not state.is_world_process_zero or "temperature" not in (logs or {}):
            return
        positive, negative = logs["positive_similarity"], logs["negative_similarity"]
        if (positive - negative) / logs["temperature"] > self.margin:
            self._since = None
            return
        self._since = state.global_step if self._since is None else self._since
        if state.global_step - self._since >= self.patience:
            self._warned = True
            logger.warning(
                "The contrastive loss has not left the level of chance for %d steps: pairs that match have a "
                "similarity of %.3f, others of %.3f. Check that the rows' pairs belong together; otherwise train "
                "with a lower learning rate or another optimizer. docs/training.md says more under "
                '"A contrastive loss that does not move".',
                state.global_step - self._since,
                positive,
                negative,
            )


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
