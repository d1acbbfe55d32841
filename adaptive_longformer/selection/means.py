"""Means of keys over runs of tokens: what coarser stages and learned directions see."""

import torch
from torch.nn import functional as F


def run_means(
    tensor: torch.Tensor, counts: torch.Tensor | None, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means over every `size` rows; the last run may be shorter.

    Args:
        tensor: [batch, heads, rows, head_dim]; may hold anything, NaN too, where a count is 0.
        counts: [batch, rows], what a row counts: bool, or of tokens whose mean it is; None: 1.
        size: rows per run.

    Returns:
        The means [batch, heads, runs, head_dim], zeros where nothing counts, and the sums of the
        counts [batch or 1, runs]; in float32, or float64 for a tensor in it.
    """
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    tensor = tensor.to(dtype)
    if counts is None:
        counts = tensor.new_ones(1, tensor.shape[2])
    else:
        counts = counts.to(dtype)
        weights = counts[:, None, :, None]
        # In place, as a second copy of long documents takes longer than all else here.
        tensor = tensor.masked_fill(weights == 0, 0.0).mul_(weights)
    counts = sum_runs(counts, 1, size)
    return sum_runs(tensor, 2, size) / counts.clamp(min=1.0)[:, None, :, None], counts


def sum_runs(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """Sums over consecutive runs of `size` along a dimension; the last run may be shorter."""
    if filler := -tensor.shape[dim] % size:
        tensor = F.pad(tensor, [0, 0] * (tensor.ndim - 1 - dim) + [0, filler])
    return tensor.unflatten(dim, (-1, size)).sum(dim=dim + 1)
