"""What the data sheets of cards say."""

import time
from dataclasses import dataclass

import psutil
import torch


@dataclass(frozen=True)
class Card:
    """
    Attributes:
        memory: Bytes.
        flops: Floating-point operations a second in bfloat16 with accumulation in float32, without sparsity.
        flops_float32: The same in float32, without TF32.
    """

    memory: float
    flops: float
    flops_float32: float


# NVIDIA's data sheets: of the SXM modules of A100 (2021), H100 (2023) and H200 (2024), of A10 (2021), L4 and L40S
# (2023); and the appendices of the GA102 (2021) and Ada (2022) architecture whitepapers for the RTX cards. Where a
# sheet gives operations with sparsity, they are halved.
CARDS = {
    "A100-40GB": Card(40e9, 312e12, 19.5e12),
    "A100-80GB": Card(80e9, 312e12, 19.5e12),
    "H100-80GB": Card(80e9, 989.4e12, 66.9e12),
    "H200": Card(141e9, 989.4e12, 66.9e12),
    "A10": Card(24e9, 125e12, 31.2e12),
    "L4": Card(24e9, 121e12, 30.3e12),
    "L40S": Card(48e9, 362e12, 91.6e12),
    "RTX-3090": Card(24e9, 71e12, 35.6e12),
    "RTX-4090": Card(24e9, 165.2e12, 82.6e12),
}
HERE = "cpu"  # this machine, whose peak is measured


def find_card(name: str) -> Card:
    """
    A card by its name in [`CARDS`], or the CPU of this machine for `"cpu"`: all of its memory, and the speed of a
    product of two matrices, which is measured in a second or two.
    """
    if name == HERE:
        return Card(float(psutil.virtual_memory().total), _measured(torch.bfloat16), _measured(torch.float32))
    return CARDS[name]


def _measured(dtype: torch.dtype, size: int = 1024, repeats: int = 4) -> float:
    matrix = torch.ones(size, size, dtype=dtype)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
