"""Our attention inside other Transformers models: `attn_implementation="adaptive_sparse"`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from adaptive_longformer.attention.functional import sparse_attention
from adaptive_longformer.modeling.attention_layer import random_seed
from adaptive_longformer.modeling.global_tokens import limit_global_tokens
from adaptive_longformer.patterns.sliding_window import SlidingWindow

NAME = "adaptive_sparse"
DEFAULT_OPTIONS = {"attention_window": 512, "num_global_tokens": 1}
# What attention layers of Transformers may ask for; None and False ask for nothing.
_UNSUPPORTED = {
    "softcap": "soft-capped scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a position bias",
    "sliding_window": "a sliding window of the model itself",
    "output_attentions": "attention probabilities (attn_implementation='eager' returns them)",
    "cu_seq_lens_q": "packed sequences",
    "cache": "a paged cache",
}


def adaptive_sparse_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Sliding window and first tokens global, with the signature of AttentionInterface.

    `module.config.adaptive_sparse` sets the pattern: {"attention_window": 512, "num_global_tokens":
    1} are the defaults. The window is the total, half on each side (only the left half under
    causality).

    Args:
        module: the attention module; its config and `is_causal` are read.
        query: [batch, heads, length, head_dim].
        key, value: [batch, key_value_heads, length, head_dim], a divisor of the query's heads.
        attention_mask: bool [batch, length], True where a token is not padding, or None.
        dropout: probability of dropping an attention probability.
        scaling: factor of the scores; None: head_dim**-0.5.
        is_causal: None: `module.is_causal`.
        kwargs: what else the model passes; only what changes nothing is accepted.

    Returns:
        The output [batch, length, heads, head_dim], and None.

    Raises:
        NotImplementedError: the model needs something this pattern cannot do.
        ValueError: the options are wrong.
    """
    for name, meaning in _UNSUPPORTED.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise _not_implemented(f"{meaning} ({name})")
    if query.shape[2] != key.shape[2]:
        raise _not_implemented(
            f"{query.shape[2]} queries for {key.shape[2]} keys "
            "(cross-attention, or decoding with a cache: pass use_cache=False)"
        )
    if value.shape[-1] != query.shape[-1]:
        raise _not_implemented("values of another head size than the queries")
    if attention_mask is not None and attention_mask.ndim != 2:
        raise _not_implemented(
            f"an attention_mask of shape {tuple(attention_mask.shape)}; pass [batch, length]"
        )
    window, num_global_tokens = _options(module.config)
    output = sparse_attention(
        query,
        key,
        value,
        SlidingWindow(window // 2),
        attention_mask=attention_mask,
        is_causal=getattr(module, "is_causal", True) if is_causal is None else is_causal,
        global_mask=_first_tokens(query, attention_mask, num_global_tokens),
        scale=scaling,
        dropout_p=dropout,
        dropout_seed=random_seed(query.device) if dropout else None,
    )
    assert isinstance(output, torch.Tensor)  # return_lse=False
    return output.transpose(1, 2).contiguous(), None


def adaptive_sparse_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The padding mask as it is, with the signature of AttentionMaskInterface.

    Returns:
        bool [batch, length], True where a token is not padding, or None.

    Raises:
        NotImplementedError: the model asks for more than causality and padding, such as packed
            sequences or its own sliding window.
    """
    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        raise _not_implemented(
            "a mask beyond causality and padding (the model's own sliding window or chunks, or "
            "packed sequences; if positions are regular, pass an attention_mask of ones)"
        )
    return attention_mask


def _options(config: Any) -> tuple[int, int]:
    given = getattr(config, NAME, None) or {}
    if unknown := set(given) - set(DEFAULT_OPTIONS):
        raise ValueError(
            f"config.{NAME} has unknown options {sorted(unknown)}, "
            f"allowed are {sorted(DEFAULT_OPTIONS)}"
        )
    window, num_global_tokens = {**DEFAULT_OPTIONS, **given}.values()
    if not isinstance(window, int) or window < 2 or window % 2:
        raise ValueError(
            f"config.{NAME}['attention_window'] is {window!r}, an even number >= 2 is needed"
        )
    if not isinstance(num_global_tokens, int) or num_global_tokens < 0:
        raise ValueError(
            f"config.{NAME}['num_global_tokens'] is {num_global_tokens!r}, "
            "a whole number >= 0 is needed"
        )
    return window, num_global_tokens


def _first_tokens(
    query: torch.Tensor, attention_mask: torch.Tensor | None, num_global_tokens: int
) -> torch.Tensor | None:
    """The first tokens of every sequence that are not padding: bool [batch, length]."""
    if num_global_tokens == 0:
        return None
    if attention_mask is None:
        attention_mask = torch.ones(
            query.shape[0], query.shape[2], dtype=torch.bool, device=query.device
        )
    return limit_global_tokens(attention_mask, num_global_tokens)


def _not_implemented(what: str) -> NotImplementedError:
    return NotImplementedError(
        f"attn_implementation={NAME!r} does not support {what}; "
        "use attn_implementation='sdpa' or 'eager' for this model"
    )
