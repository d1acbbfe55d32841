"""Where padding is: each row's first valid token, and rows rolled until they begin with it.

Masks are bool [batch, length], True where a token is not padding.
"""

from typing import Any, NamedTuple

import torch

from adaptive_longformer.attention.global_keys import GlobalKeys, global_keys
from adaptive_longformer.attention.padding import may_look


def effective_mask(mask: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """A mask on a device; None if there is none, or it is seen to hide nothing."""
    if mask is None:
        return None
    mask = mask.to(device)
    return None if may_look(mask) and mask.all() else mask


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


def left_padding(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Slots of padding before every row, int64 [batch]; None: it is seen that there are none."""
    if mask is None:
        return None
    slots = first_slots(mask)
    return None if may_look(slots) and not slots.any() else slots


class LeftPadding(NamedTuple):
    """Rolls rows so that every one begins with its first valid token, and back.

    Blocks start at slot 0, and what a block is must not depend on how a row is padded. Nothing is
    moved where no row is seen to have padding before it.

    Attributes:
        source, target: int64 [batch, length], which slot moves to a slot, and to which one it
            moves; None: nothing moves.
        before: bool [batch, length], True in the padding that a row began with.
    """

    source: torch.Tensor | None = None
    target: torch.Tensor | None = None
    before: torch.Tensor | None = None

    @classmethod
    def of(cls, mask: torch.Tensor | None) -> "LeftPadding":
        """The padding before the tokens that a mask shows; None: there is no padding."""
        return cls() if mask is None else cls.by(left_padding(mask), mask.shape[1])

    @classmethod
    def by(cls, slots: torch.Tensor | None, length: int) -> "LeftPadding":
        """So many slots of padding before every row, as `left_padding` gives them."""
        if slots is None:
            return cls()
        slot, slots = torch.arange(length, device=slots.device), slots[:, None]
        source, target = slot + slots, slot - slots
        # By hand, as ONNX has no remainder of a number that is not known.
        source = source - length * (source >= length).long()
        return cls(source, target + length * (target < 0).long(), slot < slots)

    def removed(self, rows: Any, dim: int = 1) -> Any:
        """Rows [batch, ..., length, ...] that begin with their tokens; None stays None."""
        return _taken(rows, self.source, dim)

    def restored(self, rows: torch.Tensor, dim: int = 1, zero: bool = False) -> torch.Tensor:
        """The rows as they were before `removed`; or 0 in the padding, which saw the rest from
        behind.
        """
        rows = _taken(rows, self.target, dim)
        if not zero or self.before is None:
            return rows
        return rows.masked_fill(_along(self.before, rows, dim), 0.0)


class LayerMasks(NamedTuple):
    """What all layers of a forward pass are told about its tokens, made once.

    Attributes:
        given: bool [batch, length], True where a token is not padding; None: all are.
        padding: how rows move before their blocks are chosen.
        attention_mask, global_keys: of the rows that have moved.
    """

    given: torch.Tensor | None
    padding: LeftPadding
    attention_mask: torch.Tensor | None
    global_keys: GlobalKeys | None

    @classmethod
    def of(
        cls,
        attention_mask: torch.Tensor | None,
        global_mask: torch.Tensor | None,
        padding: LeftPadding,
        max_global_tokens: int | None,
    ) -> "LayerMasks":
        """Of the masks of the rows as they were."""
        mask, keys = padding.removed(attention_mask), None
        if global_mask is not None:
            keys = global_keys(padding.removed(global_mask), mask, max_global_tokens)
        return cls(attention_mask, padding, mask, keys)


def _taken(rows: Any, slots: torch.Tensor | None, dim: int) -> Any:
    if rows is None or slots is None:
        return rows
    return rows.gather(dim, _along(slots, rows, dim).expand_as(rows))


def _along(tensor: torch.Tensor, rows: torch.Tensor, dim: int) -> torch.Tensor:
    """A tensor [batch, length] as it broadcasts to rows."""
    shape = [1] * rows.ndim
    shape[0], shape[dim] = tensor.shape
    return tensor.view(shape)
