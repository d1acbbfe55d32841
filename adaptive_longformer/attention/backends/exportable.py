"""Window and global tokens in plain tensor operations, for torch.export and ONNX.

No number is read from a tensor and no size is compared, so that batch and length may stay symbols.
O(length) memory: a block of queries meets its own block and its neighbours, never all keys. The
scores of all blocks are in memory at a time, so that kernels are smaller where they can run.
"""

import torch
from torch.nn import functional as F

from adaptive_longformer.attention.call import AttentionCall, GlobalProjections
from adaptive_longformer.attention.global_keys import GlobalKeys
from adaptive_longformer.attention.padding import ordinary_tokens, readable
from adaptive_longformer.patterns.block_layout import split_window
from adaptive_longformer.patterns.pattern import LARGEST

# Queries of a block, at most: more compute more that the window hides, fewer copy more keys.
_BLOCK_SIZE = 128


def exportable_supports(call: AttentionCall) -> str | None:
    """None, or why the exportable backend cannot run the call."""
    if call.dropout_p > 0:
        return "it is for inference (dropout_p > 0)"
    if call.return_lse:
        return "it returns no log-sum-exp (return_lse=True)"
    if call.is_causal:
        return "it has no causal mask (is_causal=True)"
    if call.span is not None:
        return "it has no adaptive span"
    if call.pattern is None:
        return "it takes a pattern, not a block layout"
    window, rest = split_window(call.pattern)
    if window is None or window.left == LARGEST or rest is not None:
        return f"it computes a window without holes and global tokens, not {call.pattern}"
    keys = call.global_keys
    if keys is not None and keys.positions is None and torch.compiler.is_compiling():
        return "a graph has room for a fixed number of global tokens: set max_global_tokens"
    return None


def run_exportable(call: AttentionCall) -> tuple[torch.Tensor, None]:
    """Output [batch, heads, length, head_dim] of a call."""
    length, device = call.query.shape[2], call.query.device
    assert call.pattern is not None
    window, _ = split_window(call.pattern)
    assert window is not None and window.right is not None
    left, right = window.left, window.right
    size = min(_BLOCK_SIZE, max(left, right, 16))
    # With one block more than is needed nothing asks whether there is more than one.
    num_blocks = length // size + 2
    start = torch.arange(num_blocks, device=device)[:, None] * size
    slot = torch.arange(size, device=device)
    near_slot = torch.arange(left + size + right, device=device)

    def near(tensor: torch.Tensor) -> torch.Tensor:
        """[batch, heads, length, width] -> [batch, heads, blocks, left + size + right, width]"""
        return F.pad(tensor, (0, 0, left, right + 2 * size))[:, :, start + near_slot]

    query, key, value = readable(call.query, call.key, call.value, call.attention_mask)
    # [batch, heads, blocks, size, head_dim]
    rows = F.pad(query * call.scale, (0, 0, 0, 2 * size))[:, :, start + slot]
    is_member = ordinary_tokens(call.attention_mask, call.global_mask)
    if is_member is None:
        is_member = torch.ones_like(query[:, 0, :, 0], dtype=torch.bool)
    is_near_member = near(is_member[:, None, :, None].to(query.dtype)).mT > 0
    offset = near_slot - slot[:, None]
    visible = is_near_member & (offset >= 0) & (offset <= left + right)
    hidden = torch.finfo(query.dtype).min
    # [batch, heads, blocks, size, left + size + right]
    scores = _product(rows, near(key).mT).masked_fill(~visible, hidden)
    if call.global_keys is None:
        output = _product(_softmax(scores, hidden), near(value))
    else:
        global_key, global_value, is_used = packed_global_keys(key, value, call.global_keys)
        shape = (-1, -1, num_blocks, -1, -1)
        global_key, global_value = (
            tensor[:, :, None].expand(shape) for tensor in (global_key, global_value)
        )
        global_scores = _product(rows, global_key.mT).masked_fill(~is_used[:, :, None], hidden)
        weights = _softmax(torch.cat([scores, global_scores], dim=-1), hidden)
        of_near, of_global = weights[..., : len(near_slot)], weights[..., len(near_slot) :]
        output = _product(of_near, near(value)) + _product(of_global, global_value)
    token = torch.arange(length, device=device)
    output = output[:, :, token // size, token % size]
    return output if call.global_keys is None else with_global_rows(output, call), None


def packed_global_keys(
    key: torch.Tensor, value: torch.Tensor, keys: GlobalKeys
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The keys and values of global tokens [batch, heads, global tokens, head_dim], and which of
    them there are, bool [batch, 1, 1, global tokens].
    """
    positions = keys.packed()
    is_used = (positions < key.shape[2])[:, None, None]
    return _picked(key, positions), _picked(value, positions), is_used


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The matrix product of two tensors with the same sizes in front."""
    return left.contiguous() @ right.contiguous()


def _softmax(scores: torch.Tensor, hidden: float) -> torch.Tensor:
    """Weights [..., keys]; zeros for a query from which all keys are hidden."""
    weights = scores.float().softmax(dim=-1) if scores.itemsize < 4 else scores.softmax(dim=-1)
    return weights.to(scores.dtype).masked_fill(scores <= hidden, 0.0)


def _picked(tensor: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[batch, heads or 1, length, width] -> [batch, heads or 1, global tokens, width]; anything in
    empty slots.
    """
    index = positions.clamp(max=tensor.shape[2] - 1)[:, None, :, None]
    return tensor.gather(2, index.expand(-1, tensor.shape[1], -1, tensor.shape[3]))


def with_global_rows(output: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """The output with the rows of global queries, which see every token."""
    assert call.global_keys is not None
    length, positions = output.shape[2], call.global_keys.packed()
    rows = _global_rows(positions, call)
    # Empty slots write to a row behind the last one.
    index = positions[:, None, :, None].expand_as(rows)
    return F.pad(output, (0, 0, 0, 1)).scatter(2, index, rows)[:, :, :length]


def _global_rows(positions: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """[batch, heads, global tokens, head_dim]; see attention/global_rows.py for how projections are
    absorbed.
    """
    mask, qkv = call.attention_mask, call.global_qkv
    if not isinstance(qkv, GlobalProjections):
        query, key, value = readable(*(qkv or (call.query, call.key, call.value)), mask)
        scores = (_picked(query, positions) * call.scale) @ key.mT
        return _attention_to_all(scores, mask) @ value
    states = qkv.hidden_states[:, None]  # [batch, 1, length, hidden_size]
    if mask is not None:
        states = states.masked_fill(~mask[:, None, :, None], 0.0)
    heads = (call.query.shape[1], -1)

    def by_head(bias: torch.Tensor | None) -> torch.Tensor | float:
        return 0.0 if bias is None else bias.unflatten(0, heads)[:, None]

    picked = _picked(states, positions)
    weights = (qkv.query_weight, qkv.key_weight, qkv.value_weight)
    query_weight, key_weight, value_weight = (weight.unflatten(0, heads) for weight in weights)
    query = (picked @ query_weight.mT + by_head(qkv.query_bias)) * call.scale
    # The bias of the keys adds the same to all scores of a row.
    weights = _attention_to_all((query @ key_weight) @ states.mT, mask)
    return (weights @ states) @ value_weight.mT + by_head(qkv.value_bias)


def _attention_to_all(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Weights [batch, heads, global tokens, length]; a global token sees itself at least."""
    hidden = torch.finfo(scores.dtype).min
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], hidden)
    return _softmax(scores, hidden)
