"""A pyramid of keys: count-weighted means over nested runs of tokens.

The mean of the keys of a node and the number of its tokens bound the attention it would get from
below (Jensen): log sum_j exp(q.k_j) >= q.mean + log count. Selection reads these bounds instead of
the keys, coarse levels first.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F

FAN_OUT = 4


class KeyPyramid(NamedTuple):
    """Summaries of the keys, one entry per level.

    Level 0 has the sub-blocks, level 1 the blocks, of so many sub-blocks each; above, node v of a
    level covers `FAN_OUT` nodes of the level below, from FAN_OUT * v on. Each level ends in empty
    nodes, so that the grandchildren of every node are there.

    Attributes:
        means: float [batch, heads, nodes, head_dim]; zero for a node without tokens.
        log_counts: float [batch or 1, nodes], logarithm of the number of tokens; -inf without any.
    """

    means: list[torch.Tensor]
    log_counts: list[torch.Tensor]


def key_pyramid(
    key: torch.Tensor,
    members: torch.Tensor | None,
    sub_block_size: int,
    num_levels: int,
    sub_blocks: int = FAN_OUT,
) -> KeyPyramid:
    """Builds the levels 0 to num_levels - 1.

    Args:
        key: [batch, heads, length, head_dim]; may hold anything, NaN too, where `members` is False.
        members: bool [batch, length], the tokens that count; None: all of them.
        sub_block_size: tokens per node of level 0.
        num_levels: how many levels.
        sub_blocks: nodes of level 0 in a node of level 1.

    Returns:
        The pyramid in float32, or float64 for float64 keys. It takes O(length) memory: less than
        (1 + 4 / 3 / sub_blocks) * length / sub_block_size rows of head_dim numbers, and the filling
        of each level.
    """
    length = key.shape[2]
    dtype = torch.promote_types(key.dtype, torch.float32)
    if members is None:
        counts = torch.ones(1, length, dtype=dtype, device=key.device)
    else:
        key = key.masked_fill(~members[:, None, :, None], 0.0)
        counts = members.to(dtype)
    sums = _sum_runs(key, sub_block_size, dtype)
    counts = _sum_runs(counts[:, None, :, None], sub_block_size, dtype)
    means, log_counts = [], []
    for level in range(num_levels):
        if level:
            fan_out = sub_blocks if level == 1 else FAN_OUT
            sums, counts = _sum_runs(sums, fan_out, dtype), _sum_runs(counts, fan_out, dtype)
        run = FAN_OUT * (FAN_OUT if level else sub_blocks)
        filler = (0, 0, 0, -sums.shape[2] % run)
        sums, counts = F.pad(sums, filler), F.pad(counts, filler)
        means.append(sums / counts.clamp(min=1.0))
        log_counts.append(counts[:, 0, :, 0].log())
    return KeyPyramid(means, log_counts)


def _sum_runs(tensor: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Sums of `size` consecutive rows; the last run may be shorter."""
    if filler := -tensor.shape[2] % size:
        tensor = F.pad(tensor, (0, 0, 0, filler))
    return tensor.unflatten(2, (-1, size)).sum(dim=3, dtype=dtype)
