"""The masks of the caller as the attention layers take them."""

from typing import Any

import torch

from adaptive_longformer.attention.global_keys import limit_global_tokens
from adaptive_longformer.modeling.alignment import left_padding
from adaptive_longformer.modeling.default_global_tokens import default_global_mask
from adaptive_longformer.modeling.input_checks import can_read_values


def resolve_masks(
    config: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    global_mask: torch.Tensor | None,
    *,
    auto_global_tokens: str,
    input_ids: torch.Tensor | None = None,
    token_type_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Fills in the default global tokens; None for a mask seen to have no effect.

    Args:
        config: a configuration with the attention fields of `AdaptiveSparseConfig`.
        hidden_states: [batch, length, hidden_size], for the shape and the device.
        attention_mask: bool [batch, length], True where a token is not padding; None: all are.
        global_mask: bool [batch, length], True where a token is global; None: the default.
        auto_global_tokens: what `config.default_global_tokens = "auto"` means here.
        input_ids, token_type_ids: [batch, length], where the default looks for the question.

    Returns:
        The attention mask and the global mask, on the device of the hidden states.
    """
    device = hidden_states.device
    if attention_mask is not None:
        attention_mask = attention_mask.to(device)
    if not config.uses_global_tokens:
        global_mask = None
    elif global_mask is not None:
        global_mask = global_mask.to(device)
    else:
        valid = attention_mask
        if valid is None:
            valid = torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=device)
        strategy = config.default_global_tokens
        if strategy == "auto":
            has_global_blocks = config.attention_pattern == "big_bird"
            strategy = "none" if has_global_blocks else auto_global_tokens
        global_mask = default_global_mask(
            strategy,
            valid,
            input_ids=input_ids,
            token_type_ids=token_type_ids,
            sep_token_id=config.sep_token_id,
        )
    if global_mask is not None and config.max_global_tokens is not None:
        global_mask = limit_global_tokens(global_mask, config.max_global_tokens)
    if can_read_values(hidden_states, validate=False):
        if attention_mask is not None and attention_mask.all():
            attention_mask = None
        if global_mask is not None and not global_mask.any():
            global_mask = None
    return attention_mask, global_mask


def padding_to_roll(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """How far every row must move for its blocks to start at its first valid token: int64 [batch];
    None if none is seen to have padding before it.
    """
    if attention_mask is None:
        return None
    shifts = left_padding(attention_mask)
    if can_read_values(shifts, validate=False) and not shifts.any():
        return None
    return shifts
