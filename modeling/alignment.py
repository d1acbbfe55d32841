"""Moves every row's first valid token to slot 0, and back.

Blocks start at slot 0. What a block is must not depend on how a row is padded, so rows with left
padding are rolled before blocks are formed.
"""

import torch


def left_padding(attention_mask: torch.Tensor) -> torch.Tensor:
    """Slots before each row's first valid token, int64 [batch]; 0 for a row without any.

    Args:
        attention_mask: bool [batch, length], True where a token is not padding.
    """
    return attention_mask.int().argmax(dim=1)  # the first of equal maxima


def roll_rows(tensor: torch.Tensor, shifts: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """Rolls every row of a batch along a dimension: slot s gets what was in slot s + shift.

    Args:
        tensor: [batch, ..., length, ...].
        shifts: int64 [batch], negative ones undo positive ones.
        dim: where the length is, at least 1.
    """
    length = tensor.shape[dim]
    slots = torch.arange(length, device=tensor.device)
    source = (slots + shifts[:, None]) % max(length, 1)  # [batch, length]
    shape = [1] * tensor.ndim
    shape[0], shape[dim] = source.shape
    return tensor.take_along_dim(source.view(shape), dim=dim)
