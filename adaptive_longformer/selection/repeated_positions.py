"""What positions say in the keys of a model that was made long by repeating its table of positions.

Tokens a whole number of periods apart have the same row of the table, their keys look alike, and a
choice by keys finds them, whatever stands there. So what the keys of equal places share, in this
document, is not seen by the choice. A place is a few rows; in these its content averages out, and
positions change little. The attention itself reads keys as they are.
"""

import torch
from torch.nn import functional as F

TOKENS_PER_PLACE = 16


def without_positions(key: torch.Tensor, is_counted: torch.Tensor, period: int) -> torch.Tensor:
    """The keys without the mean of their place; as they are in a row that ends before the period
    does. In operations that graphs of open length know, and whose order never changes.

    Args:
        key: [batch, heads, length, head_dim], in float32 at least.
        is_counted: bool [batch, heads or 1, length, 1], the tokens that the means are of.
        period: tokens until the same row comes again.
    """
    length, places = key.shape[2], -(-period // TOKENS_PER_PLACE)
    slot = torch.arange(length, device=key.device)
    # One copy more than is needed: a graph asks nowhere whether there is more than one.
    copies = torch.arange(length // period + 2, device=key.device) * period
    copies = copies + torch.arange(period, device=key.device)[:, None]

    def sums(tensor: torch.Tensor) -> torch.Tensor:
        """Sums over the tokens of a place, [..., places, width]."""
        tensor = F.pad(tensor, (0, 0, 0, 2 * period))[:, :, copies].sum(dim=3)
        tensor = F.pad(tensor, (0, 0, 0, places * TOKENS_PER_PLACE - period))
        return tensor.unflatten(2, (places, TOKENS_PER_PLACE)).sum(dim=3)

    weights = is_counted.to(key.dtype)
    means = sums(key.masked_fill(~is_counted, 0.0)) / sums(weights).clamp(min=1.0)
    is_long = (weights * (slot >= period)[:, None]).amax(dim=2, keepdim=True)
    return key - is_long * means.index_select(2, slot % period // TOKENS_PER_PLACE)
