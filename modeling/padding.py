"""Where padding is: each row's first valid token, and rows rolled until they begin with it.

Masks are bool [batch, length], True where a token is not padding.
"""

from typing import Any, TypeVar

import torch

from adaptive_longformer.modeling.input_checks import can_read_values

Rows = TypeVar("Rows", torch.Tensor, torch.Tensor | None)


def effective_mask(mask: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """A mask on a device; None if there is none, or it is seen to hide nothing."""
    if mask is None:
        return None
    mask = mask.to(device)
    return None if can_read_values(mask, validate=False) and mask.all() else mask


def first_slots(mask: torch.Tensor) -> torch.Tensor:
    """The slot of every row's first valid token, int64 [batch]; 0 for a row without any."""
    return mask.int().argmax(dim=1)  # the first of equal maxima


def first_tokens(mask: torch.Tensor) -> torch.Tensor:
    """Marks every row's first valid token: bool [batch, length]."""
    return mask & (mask.cumsum(dim=1) == 1)


def first_valid_token(
    hidden_states: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """The hidden state of every sequence's first token that is not padding: [batch, hidden_size].

    Args:
        hidden_states: [batch, length, hidden_size].
        attention_mask: [batch, length], above 0 for tokens, 0 for padding. None: no padding.

    Note:
        BERT, RoBERTa and Longformer read slot 0, which under left padding is a pad; this does not.
    """
    if attention_mask is None:
        return hidden_states[:, 0]
    index = first_slots(attention_mask.to(hidden_states.device) > 0)
    # By `take_along_dim` a graph would keep the size of the batch.
    index = index[:, None, None].expand(-1, 1, hidden_states.shape[2])
    return hidden_states.gather(1, index).squeeze(1)


class LeftPadding:
    """Rolls rows so that every one begins with its first valid token, and back.

    Blocks start at slot 0, and what a block is must not depend on how a row is padded. Nothing is
    moved where no row is seen to have padding before it.

    Args:
        slots: int64 [batch], how far every row moves; None: nowhere.
    """

    def __init__(self, slots: torch.Tensor | None = None) -> None:
        self.slots = slots

    @classmethod
    def of(cls, mask: torch.Tensor | None) -> "LeftPadding":
        """The padding before the tokens that a mask shows; None: there is no padding."""
        if mask is None:
            return cls()
        slots = first_slots(mask)
        return cls() if can_read_values(slots, validate=False) and not slots.any() else cls(slots)

    def removed(self, rows: Rows, dim: int = 1) -> Rows:
        """Rows [batch, ..., length, ...] that begin with their tokens; None stays None."""
        return self._rolled(rows, dim, 1)

    def restored(self, rows: Rows, dim: int = 1, zero: bool = False) -> Rows:
        """The rows as they were before `removed`; or 0 in the padding, which saw the rest from
        behind.
        """
        return self._rolled(rows, dim, -1, zero)

    def _rolled(self, rows: Any, dim: int, direction: int, zero: bool = False) -> Any:
        """Slot s gets what was in slot s + direction * slots."""
        if rows is None or self.slots is None:
            return rows
        length = rows.shape[dim]
        target = torch.arange(length, device=rows.device)
        source = (target + direction * self.slots[:, None]) % max(length, 1)  # [batch, length]
        shape = [1] * rows.ndim
        shape[0], shape[dim] = source.shape
        rolled = rows.take_along_dim(source.view(shape), dim=dim)
        return (
            rolled.masked_fill((target < self.slots[:, None]).view(shape), 0.0) if zero else rolled
        )
