"""Where new tokens stand after those in a cache, which may be of a fixed size."""

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from transformers.cache_utils import Cache

from adaptive_longformer.attention.padding import may_look
from adaptive_longformer.modeling.cache_name import takes_cache
from adaptive_longformer.modeling.input_checks import boolean_mask
from adaptive_longformer.modeling.padding import effective_mask


class NewTokens(NamedTuple):
    """New tokens and the keys that they may see.

    Attributes:
        slots: int64 [length], the places of the new tokens in the sequence.
        num_keys: how many keys there are, empty places of a cache of fixed size included.
        mask: bool [batch, num_keys], True where a token is not padding; None: all are.
        total: how many tokens there are; None: only a device knows.
    """

    slots: torch.Tensor
    num_keys: int
    mask: torch.Tensor | None
    total: int | None


def new_tokens(
    cache: Cache | None,
    mask: torch.Tensor | None,
    shape: tuple[int, int],
    device: torch.device,
    validate: bool,
    *,
    name: str = "attention_mask",
) -> NewTokens:
    """Places tokens [batch, length] after those of a cache.

    Args:
        cache: None: there are no tokens before these.
        mask: [batch, tokens so far], or with a cache of fixed size [batch, its size], of 0 and 1.
        shape, device: [batch, length], and where the tensors are wanted.
        validate, name: see `boolean_mask`.

    Raises:
        ValueError: the mask has a wrong type, shape or value.
    """
    batch, length = shape
    past: int | torch.Tensor = 0 if cache is None else cache.get_seq_length()
    is_known = isinstance(past, int) or may_look(past)
    total = int(past) + length if is_known else None
    num_keys: Any = total
    if cache is not None and cache.is_compileable:
        num_keys = cache.get_max_length()
        if isinstance(mask, torch.Tensor) and mask.ndim == 2 and total in (None, mask.shape[1]):
            mask = F.pad(mask, (0, num_keys - mask.shape[1]))
    mask = effective_mask(boolean_mask(name, mask, (batch, num_keys), validate), device)
    slots = torch.arange(length, device=device) + (past if total is None else total - length)
    return NewTokens(slots, num_keys, mask, total)


@takes_cache
def padded_mask(
    attention_mask: torch.Tensor | None = None, cache: Any = None, **_
) -> torch.Tensor | None:
    """A mask [batch, tokens so far] in the one shape that torch.compile sees in `generate()`."""
    if attention_mask is not None:
        missing = cache.get_max_length() - attention_mask.shape[1]
        attention_mask = F.pad(attention_mask, (0, missing))
    return attention_mask
