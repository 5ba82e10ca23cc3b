"""Values that are logged for each optimizer step, besides those that Trainer logs."""

from collections import defaultdict

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor


class StepLogs:
    """
    Collects values until the next log.

    Args:
        accelerator: Averages the values over processes.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.entries: dict[str, list[tuple[int, torch.Tensor]]] = defaultdict(list)

    def add(self, name: str, step: int, value: torch.Tensor) -> None:
        """Adds a scalar. The values that an optimizer step adds under one name are summed."""
        self.entries[name].append((step, value))

    def pop_means(self) -> dict[str, float]:
        """Returns the mean of each value over optimizer steps and processes, and removes all values."""
        means = {}
        for name, entries in self.entries.items():
            by_step: dict[int, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=self.accelerator.device))
            for step, value in entries:
                by_step[step] += value.float()
            mean = self.accelerator.reduce(torch.stack(list(by_step.values())).mean(), reduction="mean")
            means[name] = mean.item()
        self.entries.clear()
        return means


def gradient_norm(parameters: list[nn.Parameter], accelerator: Accelerator, is_fsdp_enabled: bool) -> torch.Tensor:
    """
    Returns the norm of the gradient in `.grad`, averaged over processes.

    Args:
        parameters: The trained parameters. Those without a gradient count as zero.
        accelerator: Averages gradients over processes, and removes the scale of mixed precision.
        is_fsdp_enabled: Whether FSDP has averaged the gradients already.
    """
    gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
    if not is_fsdp_enabled:
        gradients = accelerator.reduce(gradients, reduction="mean")
    norm = nn.utils.get_total_norm(gradients)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return norm if accelerator.scaler is None else norm / accelerator.scaler.get_scale()
