"""What a server's clients may ask for."""

from dataclasses import dataclass, field
from typing import Annotated

from ..settings import AtLeast, Positive


@dataclass
class Limits:
    """Limits of a server. Their help texts say what they are."""

    batch_size: Positive = field(default=32, metadata={"help": "Sequences a forward pass, at most."})
    batch_window_ms: Annotated[float, AtLeast(0)] = field(
        default=3.0, metadata={"help": "How long the first request of a batch waits for others, in milliseconds."}
    )
    max_requests: Positive = field(
        default=128, metadata={"help": "Requests that run or wait at the same time. Others get the status 429."}
    )
    max_new_tokens: Positive = field(
        default=1024,
        metadata={"help": "The longest answer in tokens, and its length if a request names none."},
    )
    max_tokens: Positive | None = field(
        default=None, metadata={"help": "The longest input in tokens. By default what the model's context holds."}
    )
    max_inputs: Positive = field(default=2048, metadata={"help": "Inputs of a request, at most."})
    max_images: Positive = field(default=16, metadata={"help": "Images of a request, at most."})
    max_image_pixels: Positive = field(
        default=50_000_000,
        metadata={
            "help": "The sum of the widths times heights of a request's images, at most. Checked before they are "
            "decoded."
        },
    )
    max_body_mb: Annotated[float, AtLeast(0, exclusive=True)] = field(
        default=32.0, metadata={"help": "The largest body of a request, and the largest remote image, in megabytes."}
    )
    allow_remote_images: bool = field(
        default=False,
        metadata={"help": "Fetch the images that http and https addresses name, but none from private networks."},
    )

    @property
    def max_body(self) -> int:
        """The largest body, in bytes."""
        return int(self.max_body_mb * 1_000_000)
