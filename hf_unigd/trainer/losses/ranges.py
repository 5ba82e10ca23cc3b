"""Indices of ranges of different lengths, one after the other."""

import torch


def expand_ranges(starts: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Lists the elements of ranges.

    Args:
        starts, lengths (`torch.LongTensor` of shape `(n,)`): The ranges `[starts[i], starts[i] + lengths[i])`.

    Returns:
        Two `torch.LongTensor`s of shape `(lengths.sum(),)`: the number of the range of each element, and the element.
    """
    owners = torch.repeat_interleave(lengths)
    place = torch.arange(len(owners), device=lengths.device) - (lengths.cumsum(0) - lengths)[owners]
    return owners, starts[owners] + place
