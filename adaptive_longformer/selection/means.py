"""Means of keys over runs of tokens: what coarser stages and learned directions see."""

import torch


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
        sums = sum_runs(tensor, 2, size)
    elif counts.dtype == torch.bool and tensor.device.type == "cpu":
        sums = _sums_of_members(tensor, counts, size)
    else:
        weights = counts.to(dtype)[:, None, :, None]
        sums = sum_runs(tensor.masked_fill(weights == 0, 0.0).mul_(weights), 2, size)
    counts = sum_runs(counts.to(dtype), 1, size)
    return sums / counts.clamp(min=1.0)[:, None, :, None], counts


def sum_runs(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """Sums over consecutive runs of `size` along a dimension; the last run may be shorter."""
    whole, rest = tensor.split([tensor.shape[dim] // size * size, tensor.shape[dim] % size], dim)
    sums = whole.unflatten(dim, (-1, size)).sum(dim=dim + 1)
    return torch.cat([sums, rest.sum(dim, keepdim=True)], dim) if rest.shape[dim] else sums


def _sums_of_members(tensor: torch.Tensor, is_member: torch.Tensor, size: int) -> torch.Tensor:
    """Sums over runs of the rows that are members. A copy of all rows without the others would take
    most of the time: only few runs hold some of either kind.
    """
    sums = sum_runs(tensor, 2, size)
    counts = sum_runs(is_member.int(), 1, size)
    sums.masked_fill_((counts == 0)[:, None, :, None], 0.0)
    batch, run = ((counts > 0) & (counts < size)).nonzero(as_tuple=True)
    row = run[:, None] * size + torch.arange(size)
    is_row, row = row < tensor.shape[2], row.clamp(max=tensor.shape[2] - 1)
    is_row &= is_member[batch[:, None], row]
    rows = tensor.movedim(1, 2)[batch[:, None], row]  # [runs, size, heads, head_dim]
    sums.movedim(1, 2)[batch, run] = rows.masked_fill(~is_row[..., None, None], 0.0).sum(dim=1)
    return sums
