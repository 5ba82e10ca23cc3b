"""Arguments shared by the commands that use a trained model."""

from dataclasses import dataclass, field

import torch


@dataclass
class InferenceArguments:
    model: str = field(metadata={"help": "A trained checkpoint: a Hub id or a folder."})
    batch_size: int = field(default=32, metadata={"help": "Sequences a forward pass."})
    dtype: str = field(
        default="auto",
        metadata={"help": "Data type of the backbone.", "choices": ["auto", "bfloat16", "float16", "float32"]},
    )
    image_folder: str | None = field(default=None, metadata={"help": "Where relative image paths start."})

    def model_kwargs(self) -> dict[str, str]:
        return {"dtype": self.dtype}

    def device(self) -> torch.device:
        return accelerator()


def accelerator() -> torch.device:
    """The GPU or other accelerator of this machine, or its CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")
