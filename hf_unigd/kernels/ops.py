"""The `torch.library` operators that torch.compile, autograd and autocast see, and the choice of the backend."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from . import compiled, eager, packing, reference, triton_backend
from .namespace import NAMESPACE
from .packing import COMPUTE_DTYPE
from .problem import ModalityEntry, Problem


BACKENDS: dict[str, Any] = {
    "reference": reference,
    "eager": eager,
    "compiled": compiled,
    "triton": triton_backend,
}


def _backend(name: str, device: torch.device) -> Any:
    if name == "auto":
        name = {"cpu": "compiled", "cuda": "triton"}.get(device.type, "eager")
        if name == "triton" and not triton_backend.is_available(device):
            name = "eager"
    if name == "compiled":
        if device.type != "cpu":
            raise ValueError(f'`backend="compiled"` needs a CPU input, but the input is on {device}: use "auto".')
        return compiled if compiled.is_available() else eager
    if name == "triton" and not triton_backend.is_available(device):
        raise ValueError(
            f'`backend="triton"` needs the `triton` package and a CUDA input, but the input is on {device}: '
            'use "auto".'
        )
    return BACKENDS[name]


def make_problem(
    x: Tensor,
    x_extents: Tensor,
    x_modalities: Tensor | None,
    y: Tensor | None,
    y_extents: Tensor | None,
    y_modalities: Tensor | None,
    pairs: Tensor | None,
    bandwidth: Tensor,
    modality_columns: list[int],
    local: str,
    per_pair_bandwidth: bool,
) -> tuple[Problem, int]:
    """Checks every value. Returns the packed problem and the exponent k of `packing.condition`."""
    sigma = bandwidth.item()
    if not 0 < sigma < torch.inf:
        raise ValueError(f"`bandwidth` must be positive and finite, but is {sigma}.")
    parts, largest = _checked_parts(x, x_extents, x_modalities, y, y_extents, y_modalities, pairs, modality_columns)
    # 16-bit features are not centred: their products are exact, which those of shifted values would not be.
    k = packing.condition(parts, largest, center=x.dtype in (torch.float64, torch.float32))
    if pairs is not None:
        pairs = pairs.detach().cpu().to(torch.int64)
        pairs = torch.stack([parts[0].rank[pairs[:, 0]], parts[-1].rank[pairs[:, 1]]], 1)
    columns = [cast(ModalityEntry, tuple(modality_columns[i : i + 4])) for i in range(0, len(modality_columns), 4)]
    problem = Problem(
        x=parts[0],
        y=parts[1] if y is not None else None,
        pairs=pairs,
        bandwidth=sigma * 2.0**k,
        per_pair_bandwidth=per_pair_bandwidth,
        local=local,
        modality_columns=tuple(columns) or ((0, 0, 0, x.shape[-1]),),
        bfloat16=x.dtype == torch.bfloat16,
    )
    return problem, k


def _checked_parts(
    x, x_extents, x_modalities, y, y_extents, y_modalities, pairs, modality_columns
) -> tuple[list, float]:
    """Checks every value. Returns the packed sequences of x and, if given, of y, and the largest |feature|."""
    parts = [packing.pack(x, x_extents, x_modalities, "x")]
    largest = packing.magnitude(parts[0], "x")
    if y is not None:
        assert y_extents is not None
        parts.append(packing.pack(y, y_extents, y_modalities, "y"))
        largest = max(largest, packing.magnitude(parts[1], "y"))
    if parts[0].modalities is not None:
        packing.check_modality_columns(parts, modality_columns)
    if pairs is not None:
        indices = pairs.detach().cpu()
        limits = torch.tensor([len(parts[0]), len(parts[-1])])
        if ((indices < 0) | (indices >= limits)).any():
            raise ValueError(
                f"`pairs` must index {len(parts[0])} sequences of x and {len(parts[-1])} of y, but ranges from "
                f"{indices.amin(0).tolist()} to {indices.amax(0).tolist()}."
            )
    return parts, largest


def _reorder(matrix: Tensor, problem: Problem, *, to_caller: bool) -> Tensor:
    """Reorders a Gram matrix between the caller's order of sequences and the packed order. Pairs keep their order."""
    if problem.pairs is not None:
        return matrix
    rows = problem.x.rank if to_caller else problem.x.order
    columns = problem.other.rank if to_caller else problem.other.order
    return matrix[rows.to(matrix.device)[:, None], columns.to(matrix.device)[None]]


@torch.library.custom_op(f"{NAMESPACE}::alignment", mutates_args=())
def alignment(
    x: Tensor,
    x_extents: Tensor,
    x_modalities: Tensor | None,
    y: Tensor | None,
    y_extents: Tensor | None,
    y_modalities: Tensor | None,
    pairs: Tensor | None,
    bandwidth: Tensor,
    modality_columns: list[int],
    local: str,
    per_pair_bandwidth: bool,
    backend: str,
) -> Tensor:
    """Returns log K of all pairs, `(n, m)`, or of the given pairs, `(p,)`.

    `x_extents` are offsets for packed `(total, d)` features and lengths for padded `(n, L, d)` features.
    `modality_columns` is a flat list with four numbers per entry: modality of x, modality of y, start, stop.
    """
    with torch.autocast(x.device.type, enabled=False):
        problem, _ = make_problem(
            x,
            x_extents,
            x_modalities,
            y,
            y_extents,
            y_modalities,
            pairs,
            bandwidth,
            modality_columns,
            local,
            per_pair_bandwidth,
        )
        result = _backend(backend, x.device).forward(problem)
        return _reorder(result.to(x.device, COMPUTE_DTYPE[x.dtype]), problem, to_caller=True)


@alignment.register_fake
def _(x, x_extents, x_modalities, y, y_extents, y_modalities, pairs, *_):
    def count(features: Tensor, extents: Tensor) -> Any:
        return extents.shape[0] - (1 if features.dim() == 2 else 0)

    n = count(x, x_extents)
    shape = (n, n if y is None else count(y, y_extents)) if pairs is None else (pairs.shape[0],)
    return x.new_empty(shape, dtype=COMPUTE_DTYPE[x.dtype])


@torch.library.custom_op(f"{NAMESPACE}::alignment_backward", mutates_args=())
def alignment_backward(
    grad: Tensor,
    x: Tensor,
    x_extents: Tensor,
    x_modalities: Tensor | None,
    y: Tensor | None,
    y_extents: Tensor | None,
    y_modalities: Tensor | None,
    pairs: Tensor | None,
    bandwidth: Tensor,
    modality_columns: list[int],
    local: str,
    per_pair_bandwidth: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients to x, to y (empty if y is None) and to the bandwidth."""
    with torch.autocast(x.device.type, enabled=False):
        problem, k = make_problem(
            x,
            x_extents,
            x_modalities,
            y,
            y_extents,
            y_modalities,
            pairs,
            bandwidth,
            modality_columns,
            local,
            per_pair_bandwidth,
        )
        grad = _reorder(grad.to(COMPUTE_DTYPE[x.dtype]), problem, to_caller=False).contiguous()
        dx, dy, d_bandwidth = _backend(backend, x.device).backward(problem, grad)
        x_grad = packing.scatter(dx.to(x.device) * 2.0**k, problem.x, x)
        y_grad = x.new_empty(0)
        if y is not None:
            assert problem.y is not None
            y_grad = packing.scatter(dy.to(x.device) * 2.0**k, problem.y, y)
        return x_grad, y_grad, torch.full_like(bandwidth, d_bandwidth * 2.0**k)


@alignment_backward.register_fake
def _(grad, x, x_extents, x_modalities, y, y_extents, y_modalities, pairs, bandwidth, *_):
    y_grad = x.new_empty(0) if y is None else y.new_empty(y.shape)
    return x.new_empty(x.shape), y_grad, torch.empty_like(bandwidth)  # contiguous, whatever the inputs' strides


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.settings = inputs[8:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    dx, dy, d_bandwidth = alignment_backward(grad, *tensors, *ctx.settings)
    return dx, None, None, None if tensors[3] is None else dy, None, None, None, d_bandwidth, *[None] * 4


alignment.register_autograd(_backward, setup_context=_setup_context)


@alignment.register_vmap
def _(info, in_dims, *args):
    raise NotImplementedError(
        "alignment_kernel does not support torch.func.vmap, because sequences differ in length. Pack them into one "
        "(total, d) tensor with offsets, and select pairs with `pairs`."
    )


@torch.library.custom_op(f"{NAMESPACE}::check_inputs", mutates_args=())
def check_inputs(
    x: Tensor,
    x_extents: Tensor,
    x_modalities: Tensor | None,
    y: Tensor | None,
    y_extents: Tensor | None,
    y_modalities: Tensor | None,
    pairs: Tensor | None,
    modality_columns: list[int],
) -> Tensor:
    """Raises where `alignment` raises. Returns the `(n,)` int64 lengths of x, so that compilers keep the call."""
    _checked_parts(x, x_extents, x_modalities, y, y_extents, y_modalities, pairs, modality_columns)
    return packing.locate(x, x_extents, "x")[1].to(x.device, copy=True)


@check_inputs.register_fake
def _(x, x_extents, *_):
    return x.new_empty((x_extents.shape[0] - (1 if x.dim() == 2 else 0),), dtype=torch.int64)


@torch.library.custom_op(f"{NAMESPACE}::log_path_count", mutates_args=())
def log_path_count(x_lengths: Tensor, y_lengths: Tensor) -> Tensor:
    """Returns the log of the number of alignments of two sequences (Delannoy numbers) in float64. Lengths broadcast.

    This is log K for kappa = 1, where the recursion is a cumulative sum along each row.
    """
    x_index, y_index = torch.broadcast_tensors(x_lengths.cpu() - 1, y_lengths.cpu() - 1)
    table = torch.empty(int(x_index.max()) + 1, int(y_index.max()) + 1, dtype=torch.float64)
    table[0] = 0
    before = torch.full((1,), -torch.inf, dtype=torch.float64)
    for i in range(1, len(table)):
        above = table[i - 1]
        table[i] = torch.logaddexp(above, torch.cat([before, above[:-1]])).logcumsumexp(0)
    return table[x_index, y_index].to(x_lengths.device)


@log_path_count.register_fake
def _(x_lengths, y_lengths):
    shape = torch.broadcast_shapes(x_lengths.shape, y_lengths.shape)
    return x_lengths.new_empty(shape, dtype=torch.float64)


@torch.library.custom_op(f"{NAMESPACE}::median_bandwidth", mutates_args=())
def median_bandwidth(x: Tensor, x_extents: Tensor, x_modalities: Tensor | None, modality_columns: list[int]) -> Tensor:
    """Returns median |x_i - x_j| sqrt(median length) as a float64 scalar, from at most 1,000 evenly spaced slices."""
    sequences = packing.pack(x, x_extents, x_modalities, "x")
    packing.magnitude(sequences, "x")
    if sequences.modalities is not None:
        packing.check_modality_columns([sequences], modality_columns)
    total = len(sequences.slices)
    sample = torch.linspace(0, total - 1, min(total, 1000), dtype=torch.float64).long()
    # Slices are taken in the caller's order, so that the result does not depend on how ties in length were broken.
    sample = torch.argsort(sequences.rows.cpu())[sample]
    slices = sequences.slices[sample.to(x.device)].double()
    if sequences.modalities is None:
        distances = torch.cdist(slices, slices)
    else:
        modalities = sequences.modalities[sample].to(x.device)
        distances = slices.new_zeros(len(slices), len(slices))
        for a, b, start, stop in (modality_columns[i : i + 4] for i in range(0, len(modality_columns), 4)):
            part = slices[:, start:stop]
            meet = (modalities[:, None] == a) & (modalities == b)
            distances = torch.where(meet, torch.cdist(part, part), distances)
    upper = torch.triu_indices(len(slices), len(slices), 1)
    distances = distances[upper[0], upper[1]]
    distances = distances[distances > 0]
    # With a single slice, or with equal slices only, any scale works.
    typical = distances.median() if len(distances) else distances.new_ones(())
    return typical * sequences.lengths.double().median().to(x.device).sqrt()


@median_bandwidth.register_fake
def _(x, x_extents, x_modalities, modality_columns):
    return x.new_empty((), dtype=torch.float64)
