"""The gradient cache: batch losses over more rows than fit in memory at once (Gao et al., 2021).

    1. The first pass embeds every chunk without a graph.
    2. The batch losses over all embeddings are differentiated with respect to the embeddings.
    3. The second pass runs every chunk again, with a graph and the random numbers of the first pass, and
       backpropagates the gradients of its embeddings and its share of the next-token loss.

Only the activations of one chunk are in memory at a time. The embeddings, their gradients and the features of a frozen
vision tower are in memory for all chunks.

Citation: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


class RandomState:
    """The state of the random number generators of the CPU and of a device at construction."""

    def __init__(self, device: torch.device):
        self.device = device
        self.cpu_state = torch.get_rng_state()
        self.device_state = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Draws the same random numbers again inside the context, and leaves the generators outside unchanged."""
        devices = [] if self.device_state is None else [self.device]
        device_type = "cuda" if self.device_state is None else self.device.type
        with torch.random.fork_rng(devices, device_type=device_type):
            torch.set_rng_state(self.cpu_state)
            if self.device_state is not None:
                torch.get_device_module(self.device).set_rng_state(self.device_state, self.device)
            yield


@dataclass
class EmbeddedChunks:
    """The result of the first pass, which the second pass needs.

    Attributes:
        embeddings (`torch.FloatTensor` of shape `(num_spans, embedding_dim)`): Embeddings of all chunks; a leaf.
        inverse_temperature (`torch.FloatTensor` of shape `()`): Inverse temperature; a leaf.
        counts: Number of spans of each chunk.
        states: State of the random number generators before each chunk.
    """

    embeddings: torch.Tensor
    inverse_temperature: torch.Tensor
    counts: list[int]
    states: list[RandomState]

    def differentiate(self, loss: torch.Tensor) -> None:
        """Computes and keeps the gradients of `loss` with respect to the embeddings and the inverse temperature."""
        gradient, self.inverse_temperature_gradient = torch.autograd.grad(
            loss, (self.embeddings, self.inverse_temperature)
        )
        self.gradients = gradient.split(self.counts)

    def surrogate(self, place: int, outputs: Any) -> torch.Tensor:
        """Returns a scalar with the same gradient through the `outputs` of chunk `place` as the loss. The last chunk's
        includes the gradient of the inverse temperature."""
        loss = (outputs.embeddings * self.gradients[place]).sum()
        if place == len(self.counts) - 1:  # the temperature is shared by all chunks, so its gradient is added once
            loss = loss + outputs.inverse_temperature * self.inverse_temperature_gradient
        return loss


def embed_chunks(
    forward: Callable[[dict[str, Any]], Any], chunks: list[dict[str, Any]], device: torch.device
) -> EmbeddedChunks:
    """
    Runs the first pass.

    Args:
        forward: Runs the model on a chunk and returns an object with `embeddings` and `inverse_temperature`.
        chunks: Model inputs with `spans` and `labels`.
        device: Device of the model.
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
