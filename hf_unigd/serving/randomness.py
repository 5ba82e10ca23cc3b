"""Random numbers of a run that takes turns with others."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch


class Randomness:
    """
    A context in which torch draws what follows a seed, whatever others draw in between. Without a seed it draws on.

    Args:
        seed: The seed.
        device: The device of the model, whose numbers are drawn.
    """

    def __init__(self, seed: int | None, device: torch.device):
        self._seed = seed
        self._devices = [torch] if device.type == "cpu" else [torch, torch.get_device_module(device)]

    def __enter__(self) -> "Randomness":
        if self._seed is not None:
            self._others = self._states()
            torch.manual_seed(self._seed)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._seed is not None:
            self._set(self._others)

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """A context in which others draw."""
        if self._seed is None:
            yield
            return
        own = self._states()
        self._set(self._others)
        yield
        self._others = self._states()
        self._set(own)

    def _states(self) -> list[torch.Tensor]:
        return [device.get_rng_state() for device in self._devices]

    def _set(self, states: list[torch.Tensor]) -> None:
        for device, state in zip(self._devices, states, strict=True):
            device.set_rng_state(state)
