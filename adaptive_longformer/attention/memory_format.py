"""The strides of what the operators return."""

import torch


def like_projection(
    tensor: torch.Tensor, dtype: torch.dtype | None = None, zero: bool = False
) -> torch.Tensor:
    """An uninitialised or zero tensor of the shape [batch, heads, length, head_dim] of another.

    It is stored as [batch, length, heads, head_dim], as linear projections give and take it, so
    that joining the heads copies nothing, and so that real and fake operators agree on the strides
    whatever those of the input are.
    """
    batch, heads, length, head_dim = tensor.shape
    make = torch.zeros if zero else torch.empty
    shape = (batch, length, heads, head_dim)
    return make(shape, dtype=dtype or tensor.dtype, device=tensor.device).transpose(1, 2)
