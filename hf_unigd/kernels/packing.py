"""Converts the caller's packed or padded tensor to `Sequences`, with the checks that need its values."""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import Sequences


COMPUTE_DTYPE = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
# Beyond these exponents the squares leave the dtype's range, so the features are scaled by a power of two.
SAFE_EXPONENT = {torch.float64: 400, torch.float32: 48}


def locate(x: Tensor, extents: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Checks the extents. Returns where each sequence starts in `x` flattened to slices, and its length.

    `extents` are offsets for packed `(total, d)` features and lengths for padded `(n, L, d)` features. Both results
    are `(n,)` int64 on the CPU.
    """
    extents = extents.detach().cpu().to(torch.int64)
    if x.dim() == 3:
        bad = ((extents < 1) | (extents > x.shape[1])).nonzero().flatten()
        if len(bad):
            i = int(bad[0])
            what = "is empty" if int(extents[i]) == 0 else f"has length {int(extents[i])}"
            raise ValueError(
                f"`{name}_lengths`: sequence {i} {what}, but every length must be between 1 and {x.shape[1]}, "
                f"the second dimension of `{name}`. Remove empty sequences."
            )
        return torch.arange(len(x)) * x.shape[1], extents
    if int(extents[0]) != 0 or int(extents[-1]) != len(x):
        raise ValueError(
            f"`{name}_offsets` must run from 0 to the number of slices, {len(x)}, but runs from {int(extents[0])} to "
            f"{int(extents[-1])}."
        )
    lengths = extents.diff()
    bad = (lengths < 1).nonzero().flatten()
    if len(bad):
        i = int(bad[0])
        what = "is empty" if int(lengths[i]) == 0 else "ends before it starts"
        raise ValueError(
            f"`{name}_offsets` must increase, but sequence {i} {what} ({int(extents[i])} to {int(extents[i + 1])}). "
            "Remove empty sequences."
        )
    return extents[:-1], lengths


def pack(x: Tensor, extents: Tensor, modalities: Tensor | None, name: str) -> Sequences:
    """Sorts the sequences by length, longest first, and concatenates their slices."""
    starts, lengths = locate(x, extents, name)
    order = torch.argsort(lengths, descending=True, stable=True)
    lengths, starts = lengths[order], starts[order]
    offsets = torch.zeros(len(order) + 1, dtype=torch.int64)
    torch.cumsum(lengths, 0, out=offsets[1:])
    rows = torch.arange(int(offsets[-1])) + torch.repeat_interleave(starts - offsets[:-1], lengths)
    on_device = rows.to(x.device)
    slices = x.detach().flatten(0, -2).index_select(0, on_device).to(COMPUTE_DTYPE[x.dtype])
    if modalities is not None:
        modalities = modalities.detach().cpu().flatten().index_select(0, rows).to(torch.int32)
    return Sequences(slices, offsets, order, on_device, modalities)


def magnitude(sequences: Sequences, name: str) -> float:
    """Returns the largest |feature|. Raises on NaN and inf."""
    lowest, highest = torch.aminmax(sequences.slices)
    largest = max(-lowest.item(), highest.item())
    if not largest < torch.inf:
        bad = sequences.rows[(~sequences.slices.isfinite()).any(1)]
        raise ValueError(
            f"`{name}` must be finite, but {len(bad)} slice(s) hold NaN or inf, the first at flattened position "
            f"{int(bad.min())}. Check the encoder that produced them. Padding beyond the lengths may hold any value."
        )
    return largest


def condition(parts: list[Sequences], largest: float, center: bool) -> int:
    """Multiplies the features by 2^k in place, so that their squares stay in range, and returns k.

    `center` also subtracts the common mean: distances do not change, and |x|^2 + |y|^2 - 2 x y loses fewer digits.
    """
    exponent = int(torch.tensor(largest, dtype=torch.float64).log2().floor()) if largest > 0 else 0
    k = -exponent if abs(exponent) > SAFE_EXPONENT[parts[0].slices.dtype] else 0
    for part in parts:
        if k:  # in two steps, because 2^k itself may be out of range
            part.slices.mul_(2.0 ** (k // 2)).mul_(2.0 ** (k - k // 2))
    if center:
        count = sum(len(part.slices) for part in parts)
        mean = sum(part.slices.sum(0) for part in parts) / count
        for part in parts:
            part.slices.sub_(mean)
    return k


def check_modality_columns(parts: list[Sequences], modality_columns: list[int]) -> None:
    """Raises if a pair of modalities that occurs has no columns."""
    known = {(modality_columns[k], modality_columns[k + 1]) for k in range(0, len(modality_columns), 4)}
    present = [
        torch.unique(part.modalities).tolist() if part.modalities is not None else [] for part in (parts[0], parts[-1])
    ]
    for a in present[0]:
        for b in present[1]:
            if (a, b) not in known:
                raise ValueError(
                    f"`modality_columns` has no columns for the modality pair ({a}, {b}), which occurs in the input; "
                    f"it has {sorted(known)}. Add `({a}, {b}): (start, stop)`."
                )


def scatter(gradient: Tensor, sequences: Sequences, like: Tensor) -> Tensor:
    """Converts the gradient of the packed slices to that of the caller's tensor, which is zero on padding."""
    flat = torch.zeros(like.shape, dtype=gradient.dtype, device=like.device)
    flat.view(-1, like.shape[-1]).index_copy_(0, sequences.rows, gradient)
    return flat.to(like.dtype)
