"""Short inputs: torch's scaled_dot_product_attention with the pattern as a dense mask."""

from functools import lru_cache

import torch
from torch.nn.functional import scaled_dot_product_attention

from adaptive_longformer.attention.call import AttentionCall
from adaptive_longformer.attention.operator import merge_global_rows
from adaptive_longformer.attention.padding import may_look, readable
from adaptive_longformer.patterns.cached_tensors import kept_in_graphs, ready_for_every_stream
from adaptive_longformer.patterns.pattern import Pattern
from adaptive_longformer.patterns.sliding_window import SlidingWindow


def sdpa_supports(call: AttentionCall) -> str | None:
    """None, or why the sdpa backend cannot run the call."""
    if call.dropout_p > 0:
        return "its dropout mask is not drawn from coordinates (dropout_p > 0)"
    if call.return_lse:
        return "it returns no log-sum-exp (return_lse=True)"
    if call.layout is not None:
        return "it takes a pattern, not a block layout"
    if call.span is not None:
        return "it has no adaptive span"
    return None


def run_sdpa(call: AttentionCall) -> tuple[torch.Tensor, None]:
    """Output [batch, heads, length, head_dim] of a call."""
    length = call.query.shape[2]
    mask = _pattern_mask(call, length)
    separate = call.global_qkv is not None
    if call.global_mask is not None and mask is not None:
        seen = call.global_mask[:, None, None, :]
        mask = mask | seen if separate else mask | seen | call.global_mask[:, None, :, None]
    if call.is_causal:
        position = torch.arange(length, device=call.query.device)
        causal = position <= position[:, None]
        mask = causal if mask is None else mask & causal
    if call.attention_mask is not None:
        valid = call.attention_mask[:, None, None, :]
        mask = valid if mask is None else mask & valid
        # torch differs between versions on rows that may see nothing: here they see everything,
        # then become zero.
        empty = ~mask.any(dim=-1, keepdim=True)
        tensors = readable(call.query, call.key, call.value, call.attention_mask)
        if may_look(empty) and not empty.any():
            output = _attend(*tensors, mask, call.scale)
        else:
            output = _attend(*tensors, mask | empty, call.scale).masked_fill(empty, 0.0)
    else:
        output = _attend(call.query, call.key, call.value, mask, call.scale)
    if call.global_mask is not None and separate:
        no_lse = output.new_zeros(output.shape[:3], dtype=torch.float32)
        output, _ = merge_global_rows(output, no_lse, call)
    return output, None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    # Of tensors whose elements share memory torch 2.13 reads and returns garbage, or it fails.
    if not torch.compiler.is_compiling():
        query, key, value = (
            tensor.contiguous() if _overlaps(tensor) else tensor for tensor in (query, key, value)
        )
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def _overlaps(tensor: torch.Tensor) -> bool:
    """Whether two elements may share a place in memory."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def _pattern_mask(call: AttentionCall, length: int) -> torch.Tensor | None:
    """The pattern as a bool mask [1, heads or 1, length, length]; None where every pair is
    allowed.
    """
    assert call.pattern is not None
    for part in call.pattern.parts:
        if part.name == "full":
            return None
        if isinstance(part, SlidingWindow) and part.is_contiguous:
            assert part.right is not None
            if min(part.left, part.right) >= length - 1 or (
                call.is_causal and part.left >= length - 1
            ):
                return None
    heads = call.query.shape[1] if call.pattern.varies_by_head else 1
    device = call.query.device
    if torch.compiler.is_compiling():
        return _dense_mask(call.pattern, length, heads, device)
    return kept_in_graphs(_cached_mask(call.pattern, length, heads, device), device)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _cached_mask(pattern: Pattern, length: int, heads: int, device: torch.device) -> torch.Tensor:
    return ready_for_every_stream(_dense_mask(pattern, length, heads, device), device)


def _dense_mask(pattern: Pattern, length: int, heads: int, device: torch.device) -> torch.Tensor:
    position = torch.arange(length, device=device)
    head = torch.arange(heads, device=device)[:, None, None]
    allowed = pattern.allowed(position[:, None], position, head, length)
    return allowed.expand(heads, length, length)[None]
