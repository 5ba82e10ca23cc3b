"""Checks of types, shapes, dtypes and devices. The operators check the values of tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .packing import COMPUTE_DTYPE


def features(x: Tensor, offsets: Tensor | None, lengths: Tensor | None, name: str) -> Tensor:
    """Checks the features of one side. Returns its extents: offsets if it is packed, lengths if it is padded."""
    if not isinstance(x, Tensor):
        raise ValueError(f"`{name}` must be a tensor, but is {type(x).__name__}.")
    if x.dtype not in COMPUTE_DTYPE:
        raise ValueError(
            f"`{name}` must be float64, float32, bfloat16 or float16, but is {x.dtype}: convert it with "
            f"`{name}.float()`."
        )
    if x.dim() not in (2, 3):
        raise ValueError(
            f"`{name}` must be packed, (total_slices, d), or padded, (n, L, d), but has shape {tuple(x.shape)}."
        )
    if 0 in x.shape:
        raise ValueError(f"`{name}` must not be empty, but has shape {tuple(x.shape)}.")
    if x.dim() == 2:
        if lengths is not None or offsets is None:
            raise ValueError(
                f"`{name}` is packed, with shape {tuple(x.shape)}: give `{name}_offsets`, not `{name}_lengths`. "
                f"Padded features have shape (n, L, d)."
            )
        return _integers(offsets, f"{name}_offsets", None)
    if offsets is not None:
        raise ValueError(
            f"`{name}` is padded, with shape {tuple(x.shape)}: give `{name}_lengths`, not `{name}_offsets`. "
            f"Packed features have shape (total_slices, d)."
        )
    if lengths is None:
        return torch.full((x.shape[0],), x.shape[1], dtype=torch.int64, device=x.device)
    return _integers(lengths, f"{name}_lengths", x.shape[0])


def _integers(values: Tensor, name: str, count: int | None) -> Tensor:
    if not isinstance(values, Tensor) or values.dtype not in (torch.int64, torch.int32):
        given = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"`{name}` must be an int64 or int32 tensor, but is {given}.")
    if values.dim() != 1 or len(values) < (2 if count is None else 1) or (count is not None and len(values) != count):
        wanted = "(n + 1,) with n at least 1" if count is None else f"({count},)"
        raise ValueError(f"`{name}` must have shape {wanted}, but has shape {tuple(values.shape)}.")
    return values


def same_kind(x: Tensor, y: Tensor) -> None:
    if x.dtype != y.dtype or x.device != y.device:
        raise ValueError(
            f"`x` and `y` must have the same dtype and device, but are {x.dtype} on {x.device} and {y.dtype} on "
            f"{y.device}."
        )
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"`x` and `y` must have the same number of features (last dimension), but have {x.shape[-1]} and "
            f"{y.shape[-1]}."
        )


def index_pairs(pairs: Tensor | None) -> None:
    if pairs is not None and (
        not isinstance(pairs, Tensor)
        or pairs.dtype not in (torch.int64, torch.int32)
        or pairs.dim() != 2
        or pairs.shape[1] != 2
        or len(pairs) == 0
    ):
        given = f"{pairs.dtype} {tuple(pairs.shape)}" if isinstance(pairs, Tensor) else type(pairs).__name__
        raise ValueError(f"`pairs` must be an integer tensor of shape (p, 2) with p at least 1, but is {given}.")


def positive(value: float | Tensor, name: str, device: torch.device) -> Tensor:
    """Checks a float or a scalar tensor and returns it as a scalar tensor, without detaching it.

    In a compiled graph, the value of a tensor is checked where it is used.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(
                f"`{name}` must be one floating-point number, but is {value.dtype} of shape {tuple(value.shape)}."
            )
        if not torch.compiler.is_compiling() and not 0 < value.item() < float("inf"):
            raise ValueError(f"`{name}` must be positive and finite, but is {value.item()}.")
        return value.reshape(())
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ValueError(f"`{name}` must be a positive, finite number, but is {value!r}.")
    return torch.tensor(value, dtype=torch.float64, device=device)


def choice(value: object, name: str, allowed: tuple[object, ...]) -> None:
    """Checks that an argument is one of the allowed values."""
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}, but is {value!r}.")


def flat_modality_columns(
    modality_columns: Mapping[tuple[int, int], tuple[int, int]] | None,
    x: Tensor,
    x_modalities: Tensor | None,
    y: Tensor | None,
    y_modalities: Tensor | None,
) -> list[int]:
    """Checks `modality_columns` and returns it as the operators take it, with both orders of every pair."""
    sides = [("x", x, x_modalities)] if y is None else [("x", x, x_modalities), ("y", y, y_modalities)]
    if modality_columns is None:
        for name, _, modalities in sides:
            if modalities is not None:
                raise ValueError(
                    f"`{name}_modalities` was given without `modality_columns`, which says in which columns "
                    "modalities are compared."
                )
        return []
    if not modality_columns:
        raise ValueError("`modality_columns` must name at least one modality pair, but is empty.")
    for name, side, modalities in sides:
        wanted = tuple(side.shape[:-1])
        if (
            not isinstance(modalities, Tensor)
            or modalities.dtype not in (torch.int64, torch.int32)
            or tuple(modalities.shape) != wanted
        ):
            given = f"{modalities.dtype} {tuple(modalities.shape)}" if isinstance(modalities, Tensor) else modalities
            raise ValueError(
                f"`{name}_modalities` must be an integer tensor of shape {wanted}, one id per slice, but is {given}."
            )
    table: dict[tuple[int, int], tuple[int, int]] = {}
    for (a, b), (start, stop) in modality_columns.items():
        if not 0 <= start < stop <= x.shape[-1] or not (0 <= a < 32 and 0 <= b < 32):
            raise ValueError(
                f"`modality_columns` must map modality ids between 0 and 31 to columns (start, stop) within "
                f"the {x.shape[-1]} features, but maps {(a, b)} to {(start, stop)}."
            )
        if table.setdefault((b, a), (start, stop)) != (start, stop):
            raise ValueError(
                f"`modality_columns` must be symmetric, but maps {(a, b)} and {(b, a)} to different columns."
            )
        table[a, b] = (start, stop)
    return [value for pair, columns in sorted(table.items()) for value in (*pair, *columns)]
