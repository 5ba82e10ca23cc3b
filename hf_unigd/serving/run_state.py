"""What running a model leaves in it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


_MISSING = object()


class RunState:
    """
    What a run of a model leaves in the attributes and buffers of its modules, and the next step of that run may read:
    Qwen-VL's `rope_deltas`, for example. Runs that take turns must keep their own. Which attributes these are is found
    by looking at what a run changes.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._places: list[tuple[dict[str, Any], str]] = []

    @contextmanager
    def discovering(self) -> Iterator[None]:
        """Finds what the runs inside of it change."""
        spaces = [space for module in self._model.modules() for space in (vars(module), module._buffers)]
        before = [dict(space) for space in spaces]
        yield
        for space, was in zip(spaces, before, strict=True):
            names = [name for name in {**was, **space} if space.get(name, _MISSING) is not was.get(name, _MISSING)]
            self._places += [(space, name) for name in names]

    def save(self) -> list[Any]:
        return [space.get(name, _MISSING) for space, name in self._places]

    def restore(self, saved: list[Any]) -> None:
        for (space, name), value in zip(self._places, saved, strict=True):
            if value is _MISSING:
                space.pop(name, None)
            else:
                space[name] = value
