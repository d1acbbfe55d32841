"""Which tokens are global keys, and where they stand: packed once, read by every layer."""

from typing import NamedTuple

import torch
from transformers.utils.import_utils import is_tracing

# Devices that nobody waits for when a number is read back.
_READ_BACK = ("cpu",)


class GlobalKeys(NamedTuple):
    """The global tokens of a batch. `global_keys` makes it once per forward pass of a model.

    Attributes:
        mask: bool [batch, length], True for a global token; none of them is padding.
        positions: int64 [batch, columns], see `pack_global_tokens`. None: not known, because the
            number of global tokens is data that may not be read here (torch.compile, without
            `max_global_tokens` or on a CPU). Operators then pack the mask inside.
    """

    mask: torch.Tensor
    positions: torch.Tensor | None = None

    def packed(self) -> torch.Tensor:
        """The positions; only for the inside of operators, where the number may be read."""
        return pack_global_tokens(self.mask) if self.positions is None else self.positions


def global_keys(
    global_mask: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    max_global_tokens: int | None = None,
) -> GlobalKeys:
    """The tokens of a mask that are not padding, at most so many, packed where that may be done.

    Args:
        global_mask: bool [batch, length], True for a global token.
        attention_mask: bool [batch, length], True where a token is not padding; None: all are.
        max_global_tokens: the first ones of every sequence; a GPU then packs so many columns
            without reading a number back. None: no limit, and the number is read.
    """
    if attention_mask is not None:
        global_mask = global_mask & attention_mask
    width = None
    if max_global_tokens is not None:
        global_mask = limit_global_tokens(global_mask, max_global_tokens)
        if torch.compiler.is_exporting():
            return GlobalKeys(global_mask, pack_global_tokens(global_mask, max_global_tokens))
        # Columns without a token cost time.
        width = None if global_mask.device.type in _READ_BACK else max_global_tokens
    if width is None and not _may_read(global_mask):
        return GlobalKeys(global_mask)
    return GlobalKeys(global_mask, pack_global_tokens(global_mask, width))


def limit_global_tokens(global_mask: torch.Tensor, max_global_tokens: int) -> torch.Tensor:
    """Keeps the first `max_global_tokens` global tokens of every sequence; bool [batch, length]."""
    return global_mask & (global_mask.cumsum(dim=1) <= max_global_tokens)


def pack_global_tokens(global_mask: torch.Tensor, width: int | None = None) -> torch.Tensor:
    """Positions of the global tokens in their order, int64 [batch, columns], filled with `length`.

    Args:
        global_mask: bool [batch, length].
        width: so many columns (or as many as tokens, if these are fewer), where no row has more
            global tokens; None: as many as the row with most of them has, which is read back from
            the device.
    """
    batch, length = global_mask.shape
    if width is None:
        width = int(global_mask.sum(dim=1).max()) if global_mask.numel() else 0
    if not torch.compiler.is_exporting():  # where sizes are not compared
        width = min(width, length)
    slot = (global_mask.cumsum(dim=1) - 1).where(global_mask, width)
    position = torch.arange(length, device=global_mask.device).expand(batch, -1)
    filled = position.new_full((batch, width + 1), length)
    return filled.scatter_(1, slot, position)[:, :width].contiguous()


def _may_read(tensor: torch.Tensor) -> bool:
    return not (tensor.is_meta or is_tracing(tensor))
