"""The processes that share the work, as `accelerate launch` or `torchrun` started them."""

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env


Made = TypeVar("Made")


def process_state() -> PartialState:
    """
    This process among those that a launcher started, and its device. A process without a launcher is alone.

    Processes that are done wait for the others as long as it takes: a launcher ends all of them if one dies.
    """
    is_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=is_cpu, timeout=timedelta(days=30))


def on_first_process(make: Callable[[], Made]) -> Made:
    """What a function returns that the first process alone calls, because it cannot be shared. All call this, and
    receive it."""
    found = [make() if process_state().is_main_process else None]
    return broadcast_object_list(found)[0]
