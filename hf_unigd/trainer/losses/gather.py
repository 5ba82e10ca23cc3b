"""Gathers the rows of all processes with exact gradients, and counts them."""

import torch
import torch.distributed as dist


def gather_counts(rows: torch.Tensor) -> tuple[list[int], int]:
    """Returns the number of rows of each process, in order of rank, and the rank of this process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [len(rows)], 0
    own = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, own)
    return [int(count) for count in counts], dist.get_rank()


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Returns the rows `(n_rank, ...)` of all processes, in order of rank. The number of rows may differ per process.

    The gradient of a row is the sum of its gradients on all processes. (`torch.distributed.nn.all_gather` on gloo
    returns wrong gradients if the incoming gradients are non-contiguous.)
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    return _GatherRows.apply(rows)


def own_rows(rows: torch.Tensor) -> torch.Tensor:
    """Stands in for [`gather_rows`] where each process uses its own rows."""
    return rows


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows):
        ctx.counts, ctx.rank = gather_counts(rows)
        # Collectives need equal shapes, so the rows are padded and the padding is removed again.
        padded = rows.new_zeros(max(ctx.counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in ctx.counts]
        dist.all_gather(gathered, padded)
        return torch.cat([part[:count] for part, count in zip(gathered, ctx.counts, strict=True)])

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.split(ctx.counts)[ctx.rank]
