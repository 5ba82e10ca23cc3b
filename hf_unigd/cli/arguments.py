"""Arguments that several commands have in common."""

from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from PIL import Image

from ..data.images import open_image
from ..evaluation.figures import is_figure
from ..modeling.images_unigd import MAX_PIXELS
from ..outputs import OutputFile
from ..settings import AtLeast, NotNegative, Positive


FigureFile = Annotated[str, OutputFile(".png", is_figure)]


def dtype_field(help: str) -> Any:
    """A dataclass field for a floating-point type, by default the one that the checkpoint is saved in."""
    return field(default="auto", metadata={"help": help, "choices": ["auto", "bfloat16", "float16", "float32"]})


@dataclass
class ImageArguments:
    image_folder: str | None = field(
        default=None, metadata={"help": "Folder that image paths start from and must not leave."}, kw_only=True
    )
    max_image_pixels: Positive = field(
        default=MAX_PIXELS,
        metadata={"help": "The largest width times height of an image, checked before it is decoded."},
        kw_only=True,
    )

    def image_settings(self) -> dict[str, Any]:
        """Keyword arguments for what opens images."""
        return {"image_folder": self.image_folder, "max_image_pixels": self.max_image_pixels}


@dataclass
class CheckpointArguments(ImageArguments):
    model: str = field(metadata={"help": "Trained checkpoint or adapter: a Hub id or a folder."})
    dtype: str = dtype_field("Data type to load the backbone in.")


@dataclass
class PartArguments:
    """Arguments of commands that work through a dataset in parts."""

    num_workers: NotNegative = field(
        default=0,
        metadata={
            "help": "Number of processes that open and process images beside the model. A stream takes at most one."
        },
        kw_only=True,
    )
    skip_bad_rows: bool = field(default=False, metadata={"help": "Skip bad rows and log their number."}, kw_only=True)
    rows_per_part: Positive = field(
        default=1000,
        metadata={"help": "Number of rows per part. An interrupted run loses at most these, per process and worker."},
        kw_only=True,
    )

    def part_settings(self) -> dict[str, Any]:
        """Keyword arguments for what works through the dataset."""
        names = ("num_workers", "skip_bad_rows", "rows_per_part")
        return {name: getattr(self, name) for name in names}


@dataclass
class SamplingArguments:
    max_new_tokens: Positive = field(default=128, metadata={"help": "Maximum number of tokens to generate."})
    temperature: Annotated[float, AtLeast(0)] = field(
        default=0.0, metadata={"help": "Sampling temperature. 0 decodes greedily."}
    )

    def generate_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for `generate`."""
        sampling = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        return {"max_new_tokens": self.max_new_tokens, **sampling}


def open_images(
    files: list[str] | None, image_folder: str | None = None, max_image_pixels: int = MAX_PIXELS
) -> list[Image.Image]:
    """
    The images that `--image` names.

    Raises:
        ValueError: a file is missing, outside the folder, too large, or not an image.
    """
    try:
        return [open_image(file, image_folder, max_image_pixels) for file in files or []]
    except ValueError as error:
        raise ValueError(f"`--image` {error}") from error


def accelerator() -> torch.device:
    """The GPU or other accelerator of this machine, otherwise its CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")
