"""Attention to a few keys at once: those of a short text, a document, or a cache."""

import torch
from torch.nn import functional as F

from adaptive_longformer.attention.second_derivatives import with_second_derivatives


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scale: float,
    dropout_p: float = 0.0,
    output_attentions: bool | None = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scaled dot product attention, and its probabilities on request.

    Args:
        query: [batch, heads, length, head_dim].
        key, value: [batch, heads, key_length, head_dim].
        mask: what [batch, heads, length, key_length] can be expanded from: bool, True = may attend,
            or what is added to the scores; None: everything may be attended to.
        scale: factor of the scores.
        dropout_p: probability of dropping an attention probability.
        output_attentions: whether to return the probabilities as well.

    Returns:
        The output [batch, heads, length, head_dim], and the attention probabilities before dropout
        [batch, heads, length, key_length] or None; zeros for a row that sees nothing (padding).
    """
    is_empty = None
    if mask is not None:
        is_hidden = ~mask if mask.dtype == torch.bool else mask == -torch.inf
        # Such a row attends to everything, then becomes zero.
        is_empty = is_hidden.all(dim=-1, keepdim=True)
        mask = mask.masked_fill(is_empty, mask.dtype == torch.bool)
    probabilities = None
    if output_attentions:
        probabilities = _probabilities(query, key, mask, scale)
        if is_empty is not None:
            probabilities = probabilities.masked_fill(is_empty, 0.0)
        output = F.dropout(probabilities, dropout_p) @ value
    else:
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout_p, scale=scale
        )
        if dropout_p == 0:
            (output,) = with_second_derivatives((output,), _defined, query, key, value, mask, scale)
        if is_empty is not None:
            output = output.masked_fill(is_empty, 0.0)
    return output, probabilities


def _probabilities(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    scores = query @ key.mT * scale
    if mask is not None:
        is_bool = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -torch.inf) if is_bool else scores + mask
    precise = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(dim=-1, dtype=precise).to(query.dtype)


def _defined(query, key, value, mask, scale) -> tuple[torch.Tensor]:
    return (_probabilities(query, key, mask, scale) @ value,)
