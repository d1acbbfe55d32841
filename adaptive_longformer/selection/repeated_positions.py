"""What positions say in the keys of a model that was made long by repeating its table of positions.

Tokens a whole number of periods apart have the same row of the table, their keys look alike, and a
choice by keys finds them, whatever stands there. So what the keys of equal places share, in this
document, is not seen by the choice. A place is a few rows; in these its content averages out, and
positions change little. The attention itself reads keys as they are.
"""

import torch
from torch.nn import functional as F

TOKENS_PER_PLACE = 16


class PlaceMeans:
    """The mean key of every place of a period.

    Args:
        key: [batch, heads, length, head_dim].
        members: bool [batch, length], the tokens that count; None: all.
        period: tokens until the same row comes again.

    Attributes:
        means: [batch, heads, places, head_dim], in float32 at least; 0 of a place without members,
            and in a row that ends before the period does.
        place: int64 [length], the place of every token.
    """

    def __init__(self, key: torch.Tensor, members: torch.Tensor | None, period: int) -> None:
        length = key.shape[2]
        copies, places = -(-length // period), -(-period // TOKENS_PER_PLACE)
        self.place = torch.arange(length, device=key.device) % period // TOKENS_PER_PLACE

        def sums(tensor: torch.Tensor) -> torch.Tensor:
            """Sums over the tokens of a place, without an order that may change."""
            tensor = F.pad(tensor, (0, 0, 0, copies * period - length))
            tensor = tensor.unflatten(2, (copies, period)).sum(dim=2)
            tensor = F.pad(tensor, (0, 0, 0, places * TOKENS_PER_PLACE - period))
            return tensor.unflatten(2, (places, TOKENS_PER_PLACE)).sum(dim=3)

        precise = key.to(torch.promote_types(key.dtype, torch.float32))
        is_counted = precise.isfinite().all(dim=-1, keepdim=True)
        if members is not None:
            is_long = members[:, period:].any(dim=1)[:, None, None, None]
            is_counted = is_counted & members[:, None, :, None] & is_long
        counts = sums(is_counted.to(precise.dtype))
        self.means = sums(precise.where(is_counted, 0.0)) / counts.clamp(min=1.0)

    def removed(self, key: torch.Tensor) -> torch.Tensor:
        """The keys without the mean of their place."""
        return (key - self.means[:, :, self.place]).to(key.dtype)
