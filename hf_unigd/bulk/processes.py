"""The processes that share the work, as `accelerate launch` or `torchrun` started them."""

from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def process_state() -> PartialState:
    """
    This process among those that a launcher started, and its device. A process without a launcher is alone.

    Processes that are done wait for the others as long as it takes: a launcher ends all of them if one dies.
    """
    is_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=is_cpu, timeout=timedelta(days=30))
