"""Whatever a padded slot holds, NaN included, must reach no real token."""

import torch
from torch._subclasses import FakeTensor


def may_look(tensor: torch.Tensor) -> bool:
    """Whether a number can be read, and nobody waits for a device: on a CPU, in no graph that is
    being traced.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and isinstance(tensor, torch.Tensor)  # torch.fx has a proxy in its place
        and tensor.device.type == "cpu"
        and not isinstance(tensor, FakeTensor)
    )


def are_small(*tensors: torch.Tensor) -> bool:
    """Whether all numbers are seen to be finite, and below 1e19: then products with them are, too,
    and a weight of 0 stops them. float16 has no room for such products.
    """
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    if not may_look(tensors[0]) or tensors[0].dtype == torch.float16:
        return False
    norms = [torch.linalg.vector_norm(tensor.detach(), dtype=dtype) for tensor in tensors]
    return all(norm < torch.inf for norm in norms)


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
    # Looking takes a tenth of the time of three copies.
    if attention_mask is None or are_small(query, key, value):
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
