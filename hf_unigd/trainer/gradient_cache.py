"""The gradient cache: batch losses over more rows than fit in memory at once (Gao et al., 2021).

    1. Every chunk is embedded without a graph.
    2. The batch losses of all embeddings are differentiated with respect to them.
    3. Every chunk runs again, with a graph, with the randomness of the first time; the gradients of its embeddings and
       its share of the next-token loss go back through it.

Only one chunk's activations are in memory at a time. The embeddings, their gradients and the features of frozen vision
towers are, of all chunks.

Citation: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


class RandomState:
    """Where the random numbers of the CPU and of a device stood, to draw them again."""

    def __init__(self, device: torch.device):
        self.device = device
        self.cpu_state = torch.get_rng_state()
        self.device_state = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Draws the same numbers again inside, and goes on outside as if nothing had been drawn."""
        devices = [] if self.device_state is None else [self.device]
        device_type = "cuda" if self.device_state is None else self.device.type
        with torch.random.fork_rng(devices, device_type=device_type):
            torch.set_rng_state(self.cpu_state)
            if self.device_state is not None:
                torch.get_device_module(self.device).set_rng_state(self.device_state, self.device)
            yield


@dataclass
class EmbeddedChunks:
    """What the first pass leaves to the second.

    Attributes:
        embeddings (`torch.FloatTensor` of shape `(num_spans, embedding_dim)`): Of all chunks; a leaf.
        inverse_temperature (`torch.FloatTensor` of shape `()`): Inverse temperature; a leaf.
        counts: Spans of each chunk.
        states: Where the random numbers stood before each chunk.
    """

    embeddings: torch.Tensor
    inverse_temperature: torch.Tensor
    counts: list[int]
    states: list[RandomState]

    def differentiate(self, loss: torch.Tensor) -> None:
        """The second step: keeps the gradients of `loss`."""
        gradient, self.inverse_temperature_gradient = torch.autograd.grad(
            loss, (self.embeddings, self.inverse_temperature)
        )
        self.gradients = gradient.split(self.counts)

    def surrogate(self, place: int, outputs: Any) -> torch.Tensor:
        """A scalar whose gradient through the `outputs` of a chunk is that of the loss."""
        loss = (outputs.embeddings * self.gradients[place]).sum()
        if place == len(self.counts) - 1:  # the temperature is the same in every chunk
            loss = loss + outputs.inverse_temperature * self.inverse_temperature_gradient
        return loss


def embed_chunks(
    forward: Callable[[dict[str, Any]], Any], chunks: list[dict[str, Any]], device: torch.device
) -> EmbeddedChunks:
    """
    The first pass.

    Args:
        forward: Runs the model on a chunk; returns `embeddings` and `inverse_temperature`.
        chunks: Model inputs, with `spans` and `labels`.
        device: Whose random numbers the model draws.
    """
    states, outputs = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append(RandomState(device))
            outputs.append(forward({**chunk, "labels": torch.full_like(chunk["labels"], -100)}))
    return EmbeddedChunks(
        torch.cat([output.embeddings for output in outputs]).detach().requires_grad_(),
        outputs[0].inverse_temperature.detach().requires_grad_(),
        [len(output.embeddings) for output in outputs],
        states,
    )
