"""The definition of sparse attention: dense, differentiable by autograd, readable beside the
formulas.

Everything else in this package equals this file, in value and in gradient.
"""

from collections.abc import Callable

import torch

from adaptive_longformer.attention.call import AttentionCall, AttentionSpan, GlobalProjections
from adaptive_longformer.attention.dropout import column_keys, keep_words, row_keys
from adaptive_longformer.attention.padding import readable
from adaptive_longformer.patterns.block_layout import BlockLayout, EntryFlag, split_window

MIN_WEIGHT = 1e-6


def reference_attention(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [batch, heads, length, head_dim] and log-sum-exp [batch, heads, length] of a call."""
    return dense_attention(call)[:2]


def dense_attention(
    call: AttentionCall, hand_out: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, log-sum-exp, and the attention weights before dropout that the output is computed
    from, [batch, heads, length, length]; rows that see nothing are zero. The weights first pass
    through `hand_out`.
    """
    scores, value, value_global = _scores(call)
    row_max = scores.detach().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    weights = (scores - row_max).exp()
    total = weights.sum(dim=-1, keepdim=True)
    is_empty = total == 0
    probabilities = weights / total.masked_fill(is_empty, 1.0)
    lse = (row_max + total.masked_fill(is_empty, 1.0).log()).masked_fill(is_empty, -torch.inf)
    kept = probabilities = probabilities if hand_out is None else hand_out(probabilities)
    if call.dropout_p > 0:
        assert call.dropout_seed is not None
        batch, heads, length, _ = call.query.shape
        rows = row_keys(call.dropout_seed, batch, heads, length)[..., None]
        keep = keep_words(rows, column_keys(call.dropout_seed, length), call.dropout_p)
        kept = kept.masked_fill(keep == 0, 0.0) / (1 - call.dropout_p)
    kept = kept.to(value.dtype)
    output = kept @ value
    if value_global is not None:
        assert call.global_mask is not None
        output = torch.where(call.global_mask[:, None, :, None], kept @ value_global, output)
    return output, lse.squeeze(-1), probabilities


def span_log_weight(span: AttentionSpan, distance: torch.Tensor) -> torch.Tensor:
    """The logarithm of a learned window's weight, -inf where it is 0.

    Args:
        span: the window.
        distance: [queries, keys], how many tokens the two are apart.

    Returns:
        [heads, queries, keys].
    """
    weight = (span.length[:, None, None] + span.ramp - distance) / span.ramp
    return weight.clamp(MIN_WEIGHT, 1.0).log().masked_fill(weight <= 0, -torch.inf)


def dense_mask(call: AttentionCall) -> torch.Tensor:
    """Which key each query sees: bool, broadcasts to [batch, heads, length, length]."""
    window, others = _local_pairs(call)
    visible = window | others
    if call.global_mask is not None:
        visible = visible | call.global_mask[:, None, :, None] | call.global_mask[:, None, None, :]
    if call.attention_mask is not None:
        visible = visible & call.attention_mask[:, None, None, :]
    if call.is_causal:
        query_index, key_index, _ = _indices(call)
        visible = visible & (key_index <= query_index)
    return visible


def _scores(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Scores with -inf where nothing is seen, the values, and those that global queries read (None:
    the same).
    """
    query, key, value = readable(call.query, call.key, call.value, call.attention_mask)
    scores = query @ key.transpose(-1, -2) * call.scale
    bias = _bias(call)
    if bias is not None:
        scores = scores + bias
    value_global = None
    if call.global_qkv is not None and call.global_mask is not None:
        global_qkv = call.global_qkv
        if isinstance(global_qkv, GlobalProjections):
            if call.attention_mask is not None:
                states = global_qkv.hidden_states.masked_fill(~call.attention_mask[..., None], 0.0)
                global_qkv = global_qkv._replace(hidden_states=states)
            global_qkv = global_qkv.project(call.query.shape[1])
        query_global, key_global, value_global = readable(*global_qkv, call.attention_mask)
        scores_global = query_global @ key_global.transpose(-1, -2) * call.scale
        scores = torch.where(call.global_mask[:, None, :, None], scores_global, scores)
    return scores.masked_fill(~dense_mask(call), -torch.inf), value, value_global


def _indices(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query [length, 1], key [length] and head [heads, 1, 1] positions."""
    position = torch.arange(call.query.shape[2], device=call.query.device)
    head = torch.arange(call.query.shape[1], device=call.query.device)
    return position[:, None], position, head[:, None, None]


def _local_pairs(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """The pairs of the window, and all other pairs but those of global tokens: two disjoint bool
    tensors, 4-D.
    """
    length = call.query.shape[2]
    query_index, key_index, head_index = _indices(call)
    nothing = torch.zeros(1, 1, length, length, dtype=torch.bool, device=call.query.device)

    def pairs(pattern) -> torch.Tensor:
        if pattern is None:
            return nothing
        allowed = pattern.allowed(query_index, key_index, head_index, length)
        return allowed.view((1,) * (4 - allowed.ndim) + allowed.shape)

    if call.layout is None:
        assert call.pattern is not None
        window, rest = split_window(call.pattern)
        return pairs(window), pairs(rest) & ~pairs(window)
    layout = call.layout
    is_window = (layout.flags & EntryFlag.WINDOW) != 0
    is_pattern = (layout.flags & EntryFlag.PATTERN) != 0
    in_window = pairs(layout.window)
    routed = _spread(layout, ~is_window & ~is_pattern) | (
        _spread(layout, is_pattern) & pairs(layout.pattern)
    )
    return _spread(layout, is_window) & in_window, routed & ~in_window


def _spread(layout: BlockLayout, values: torch.Tensor) -> torch.Tensor:
    """Values of entries [batch, heads, query_blocks, entries] at their token pairs, 0 or False
    elsewhere.
    """
    shape = torch.broadcast_shapes(values.shape, layout.key_blocks.shape)
    blocks = layout.key_blocks.long().where(layout.used, 0).expand(shape)
    summand = values.to(torch.int32) if values.dtype == torch.bool else values
    # Behind the end of a list anything may stand.
    summand = summand.where(layout.used, 0).expand(shape)
    dense = summand.new_zeros(*shape[:3], layout.num_key_blocks).scatter_add(-1, blocks, summand)
    dense = dense.repeat_interleave(layout.query_block_size, dim=2)[:, :, : layout.length]
    dense = dense.repeat_interleave(layout.key_block_size, dim=3)[..., : layout.length]
    return dense > 0 if values.dtype == torch.bool else dense


def _bias(call: AttentionCall) -> torch.Tensor | None:
    """What is added to the scores: the adaptive span in the window, the entry bias elsewhere, never
    on global rows and keys.
    """
    if call.span is None and call.entry_bias is None:
        return None
    window, others = _local_pairs(call)
    bias = torch.zeros((), dtype=call.query.dtype, device=call.query.device)
    if call.span is not None:
        query_index, key_index, _ = _indices(call)
        log_weight = span_log_weight(call.span, (key_index - query_index).abs())
        bias = torch.where(window, log_weight, bias)
    if call.entry_bias is not None:
        assert call.layout is not None
        is_window = (call.layout.flags & EntryFlag.WINDOW) != 0
        entry_bias = _spread(call.layout, call.entry_bias.masked_fill(is_window, 0.0))
        bias = torch.where(others, entry_bias, bias)
    if call.global_mask is not None:
        is_global = call.global_mask[:, None, :, None] | call.global_mask[:, None, None, :]
        bias = bias.masked_fill(is_global, 0.0)
    return bias
