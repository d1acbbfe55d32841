"""Linear attention: the softmax's kernel replaced by a product of feature maps, in O(n)."""

import torch
from torch.nn import functional as F

_CHUNK_SIZE = 64


def linear_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """Attention with weights proportional to phi(query) . phi(key), phi(x) = elu(x) + 1.

    Every query reads all keys (all earlier ones and itself under causality), but never one by one:
    the keys are summed into one [head_dim, head_dim] state. Source: Katharopoulos et al. 2020,
    equations 5 to 7.

    Args:
        query, key, value: [batch, heads, length, head_dim]; no scale is applied.
        attention_mask: bool [batch, length], True where a token is not padding; None: all are.
        is_causal: whether later keys are hidden.

    Returns:
        [batch, heads, length, head_dim]; zeros for a row that may see nothing.

    Note:
        No dropout: there are no attention weights to drop.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    features_query, features_key = _features(query.to(dtype)), _features(key.to(dtype))
    values = value.to(dtype)
    if attention_mask is not None:
        padding = ~attention_mask[:, None, :, None]
        features_key = features_key.masked_fill(padding, 0.0)
        values = values.masked_fill(padding, 0.0)
    # A last column of ones makes the normaliser come out of the same products.
    values = F.pad(values, (0, 1), value=1.0)
    if is_causal:
        total = _causal_sums(features_query, features_key, values)
    else:
        total = features_query @ (features_key.transpose(-1, -2) @ values)
    weighted, normaliser = total[..., :-1], total[..., -1:]
    is_empty = normaliser == 0
    output = weighted / normaliser.masked_fill(is_empty, 1.0)
    return output.masked_fill(is_empty, 0.0).to(query.dtype)


def _features(tensor: torch.Tensor) -> torch.Tensor:
    return F.elu(tensor) + 1


def _causal_sums(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Sums over all keys up to each query: its chunk densely, earlier chunks as one state."""
    length = query.shape[2]
    filler = -length % _CHUNK_SIZE

    def chunks(tensor: torch.Tensor) -> torch.Tensor:
        padded = F.pad(tensor, (0, 0, 0, filler))
        return padded.unflatten(2, (-1, _CHUNK_SIZE))  # [batch, heads, chunk, token, channel]

    query, key, value = chunks(query), chunks(key), chunks(value)
    states = key.transpose(-1, -2) @ value  # [batch, heads, chunk, channel, channel]
    earlier = states.cumsum(dim=2) - states
    within = (query @ key.transpose(-1, -2)).tril()
    total = within @ value + query @ earlier
    return total.flatten(2, 3)[:, :, :length]
