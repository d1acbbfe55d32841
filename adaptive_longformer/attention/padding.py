"""Whatever a padded slot holds, NaN included, must reach no real token."""

import torch


def readable(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value [batch, heads, length, head_dim] without what a weight of 0 cannot stop.

    Keys and values become 0 in padding. Padded queries are computed like others, so of them only
    what is not finite becomes 0: in the backward pass a weight that is NaN would reach the keys
    even where the gradient of the output is 0.

    Args:
        query, key, value: as in `sparse_attention`.
        attention_mask: bool [batch, length], True where a token is not padding; None: no padding.
    """
    if attention_mask is None:
        return query, key, value
    # Three copies less for a mask without padding; elsewhere it would wait for the device.
    can_look = attention_mask.device.type == "cpu" and not torch.compiler.is_compiling()
    if can_look and attention_mask.all():
        return query, key, value
    padding = ~attention_mask[:, None, :, None]
    query = query.masked_fill(padding & ~query.isfinite(), 0.0)
    return query, key.masked_fill(padding, 0.0), value.masked_fill(padding, 0.0)


def ordinary_tokens(
    attention_mask: torch.Tensor | None, global_mask: torch.Tensor | None
) -> torch.Tensor | None:
    """The tokens that are neither padding nor global, bool [batch, length]; None: all are."""
    if global_mask is None:
        return attention_mask
    return ~global_mask if attention_mask is None else attention_mask & ~global_mask
