"""Pictures of what an evaluation retrieves, for the trackers that take pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.integrations.integration_utils import rewrite_logs
from transformers.utils import logging

from ..data import ExampleDataset
from ..data.example import Messages, iter_parts
from ..evaluation.figures import draw_retrieval


logger = logging.get_logger(__name__)

_QUERIES = 6
_RESULTS = 5


def _to_tensorboard(callback: Any, name: str, picture: Image.Image, step: int) -> None:
    callback.tb_writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
    callback.tb_writer.flush()


def _to_trackio(callback: Any, name: str, picture: Image.Image, step: int) -> None:
    import trackio

    trackio.log({name: trackio.Image(picture), "train/global_step": step})


def _to_wandb(callback: Any, name: str, picture: Image.Image, step: int) -> None:
    import wandb

    wandb.log({name: wandb.Image(picture), "train/global_step": step})


# How the tracker of a callback takes a picture. Each logs it at the step at which the callback logs the metrics.
_SENDERS: dict[type[TrainerCallback], Callable[[Any, str, Image.Image, int], None]] = {
    TensorBoardCallback: _to_tensorboard,
    TrackioCallback: _to_trackio,
    WandbCallback: _to_wandb,
}


@dataclass
class _Retrieved:
    examples: ExampleDataset
    rows: np.ndarray
    keys: np.ndarray
    ranking: np.ndarray
    prefix: str


class RetrievalPictures(TrainerCallback):
    """
    After an evaluation, sends a picture of some queries and of what they find to the trackers of the run: the
    positives of rows at equal distances, and the anchors that are nearest to each, of which the right one has a green
    frame.

    Args:
        callbacks: All callbacks of the trainer, the trackers' among them. The list may grow.
    """

    def __init__(self, callbacks: Sequence[TrainerCallback]):
        self._callbacks = callbacks
        self._retrieved: _Retrieved | None = None

    def keep(
        self, dataset: Any, predictions: dict[str, np.ndarray], labels: dict[str, np.ndarray], prefix: str
    ) -> None:
        """
        Keeps what an evaluation found until its metrics have been logged, by when every tracker has begun its run.

        Args:
            dataset: What was evaluated. Nothing is kept of a stream or a mixture, whose rows are not found by number.
            predictions, labels: The arrays of [`~hf_unigd.trainer.evaluation.retrieval_prediction`].
            prefix: Prefix of the names of the metrics.
        """
        if isinstance(dataset, ExampleDataset) and any(type(each) in _SENDERS for each in self._callbacks):
            self._retrieved = _Retrieved(
                dataset, labels["rows"], labels["anchor_keys"], predictions["positive_to_anchor"], prefix
            )

    def on_predict(self, args, state, control, **kwargs):
        self._retrieved = None  # a prediction's metrics are not logged

    def on_evaluate(self, args, state, control, **kwargs):
        retrieved, self._retrieved = self._retrieved, None
        if retrieved is None or not state.is_world_process_zero:
            return
        try:
            picture = _draw(retrieved)
        except ImportError as error:
            logger.warning_once(f"No pictures of retrieval are logged: {error}")
            return
        (name,) = rewrite_logs({f"{retrieved.prefix}_retrieval": None})
        for callback in self._callbacks:
            if send := _SENDERS.get(type(callback)):
                send(callback, name, picture, state.global_step)


def _draw(retrieved: _Retrieved) -> Image.Image:
    count = len(retrieved.rows)
    shown = []
    for place in np.linspace(0, count - 1, min(count, _QUERIES)).astype(int):
        image, text = _contents(retrieved.examples.parse(int(retrieved.rows[place])).positive or [])
        results = []
        for hit in retrieved.ranking[place][:_RESULTS]:
            anchor = retrieved.examples.parse(int(retrieved.rows[hit])).anchor
            results.append((*_contents(anchor), bool(retrieved.keys[hit] == retrieved.keys[place])))
        shown.append((text or image or "", results))
    with TemporaryDirectory() as folder:
        file = Path(folder) / "retrieval.png"
        draw_retrieval(
            shown, file, f"Queries, and the nearest of {len(np.unique(retrieved.keys))}. The right one is green."
        )
        return Image.open(file).convert("RGB")


def _contents(messages: Messages) -> tuple[Image.Image | None, str]:
    """The first image of a sequence, if it has one, and its texts."""
    parts = [part for _, part in iter_parts(messages)]
    images = [part["image"] for part in parts if part["type"] == "image"]
    return next(iter(images), None), " ".join(part["text"] for part in parts if part["type"] == "text")
