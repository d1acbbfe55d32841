"""The public attention operator."""

import torch
from typing_extensions import Unpack

from adaptive_longformer.attention.backends.choose import BACKENDS, choose_backend
from adaptive_longformer.attention.call import (
    AttentionCall,
    AttentionOptions,
    AttentionSpan,
    GlobalQKV,
    make_call,
)
from adaptive_longformer.attention.global_keys import GlobalKeys
from adaptive_longformer.attention.not_finite import is_finite, rows_of_nan
from adaptive_longformer.attention.operator import collapse, expand
from adaptive_longformer.attention.reference import dense_attention, reference_attention
from adaptive_longformer.attention.second_derivatives import (
    has_tangents,
    with_second_derivatives,
)
from adaptive_longformer.patterns.block_layout import BlockLayout
from adaptive_longformer.patterns.pattern import Pattern


def sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern_or_layout: Pattern | BlockLayout,
    *,
    attention_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    global_mask: torch.Tensor | GlobalKeys | None = None,
    max_global_tokens: int | None = None,
    global_qkv: GlobalQKV | None = None,
    entry_bias: torch.Tensor | None = None,
    span: AttentionSpan | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention in which every query reads only the keys that a pattern, a layout and the global
    tokens allow.

    Token j is visible to token i iff j is not padding, and not (is_causal and j > i), and the
    pattern or layout allows (i, j), or i or j is global. One softmax runs over all visible keys,
    each counted once.

    Under torch.autocast query, key, value and the tensors of global_qkv are cast to its type,
    float64 excepted, and the output has that type, as with torch's scaled_dot_product_attention.

    Args:
        query, key, value: [batch, heads, length, head_dim]. Key and value may have fewer heads, a
            divisor of the query's (grouped-query attention).
        pattern_or_layout: which keys a query sees, as a rule or as lists of blocks. A layout made
            by hand is checked at its first use outside of torch.compile (`BlockLayout.check_once`).
        attention_mask: bool [batch, length], True for a real token, False for padding.
        is_causal: hides later keys, from global tokens too.
        global_mask: bool [batch, length], True for tokens that see every token and are seen by all.
            Padding is not global, whatever this mask says. Or `GlobalKeys`, packed once for many
            calls.
        max_global_tokens: at most this many tokens of a sequence are global, the first ones. So
            many rows are then computed on a GPU, and nothing is read back from it: CUDA graphs need
            this. None: no limit; the number is looked up.
        global_qkv: the separate projections of the rows of global queries, applied ([batch, heads,
            length, head_dim] each) or not (`GlobalProjections`); None: query, key and value serve
            global rows too.
        entry_bias: float, broadcasts to the layout's key_blocks: added to all scores of an entry,
            on top of the layout's own bias; WINDOW entries, global rows and global keys take none.
            Needs a layout.
        span: a learned window per head, see `AttentionSpan`.
        scale: factor of the scores; 1 / sqrt(head_dim) if not given.
        dropout_p: probability that an attention weight is dropped.
        dropout_seed: int64 scalar tensor; the same seed drops the same weights on every backend.
            Needed with dropout_p > 0.
        return_lse: also return the log-sum-exp of the scores of each row.
        backend: "auto", or the name of a backend, which then runs or raises.

    Returns:
        Output [batch, heads, length, head_dim]; with return_lse also float [batch, heads, length].
        A row that sees nothing is zero, with an LSE of -inf and zero gradients. On a CPU a row that
        reads a number that is not finite is NaN, and no other row.

    Raises:
        ValueError: an argument has a wrong shape, type or value; the message names it, its value
            and what is allowed.
    """
    call = make_call(
        query, key, value, pattern_or_layout, attention_mask=attention_mask, is_causal=is_causal,
        global_mask=global_mask, max_global_tokens=max_global_tokens, global_qkv=global_qkv,
        entry_bias=entry_bias, span=span, scale=scale, dropout_p=dropout_p,
        dropout_seed=dropout_seed, return_lse=return_lse,
    )  # fmt: skip
    output, lse = _run(call, backend)
    if return_lse:
        assert lse is not None
        return output, lse
    return output


def _run(call: AttentionCall, backend: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Output and log-sum-exp, if the backend has one, with all the derivatives of the reference."""
    if has_tangents(call.query, call.key, call.value):
        if backend not in ("auto", "reference"):
            raise ValueError(
                f"backend {backend!r} has no forward-mode derivatives, 'reference' has"
            )
        backend = "reference"
    chosen = choose_backend(call, backend)
    output, lse = chosen.run(call) if call.query.shape[2] else _of_no_tokens(call)
    if not is_finite(call, output):
        return rows_of_nan(call, chosen.run, BACKENDS["blocked"].run)
    if chosen.name == "reference" or not output.requires_grad:
        return output, lse
    results = (output,) if lse is None else (output, lse)
    output, lse, *_ = *with_second_derivatives(results, _defined, *expand(call)), None
    return output, lse


def _defined(*arguments) -> tuple[torch.Tensor, torch.Tensor]:
    return reference_attention(collapse(arguments))


def _of_no_tokens(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of no tokens: no backend needs to know how to reduce over no keys."""
    output = call.query + call.key + call.value
    return output, torch.zeros(output.shape[:3], device=output.device)


def attention_probabilities(
    query: torch.Tensor,
    key: torch.Tensor,
    pattern_or_layout: Pattern | BlockLayout,
    **options: Unpack[AttentionOptions],
) -> torch.Tensor:
    """The attention weights of `sparse_attention` as a dense tensor [batch, heads, length, length],
    without dropout.

    Takes the options of `sparse_attention` that shape the scores. Every row sums to 1, rows that
    see nothing to 0. Needs O(length^2) memory: for inspection.
    """
    return dense_attention(make_call(query, key, key, pattern_or_layout, **options))[2]


def explain_backends(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern_or_layout: Pattern | BlockLayout,
    **options: Unpack[AttentionOptions],
) -> dict[str, str | None]:
    """For each backend None if it can run this call of `sparse_attention`, or the reason why
    not.
    """
    call = make_call(query, key, value, pattern_or_layout, **options)
    return {name: backend.unsupported(call) for name, backend in BACKENDS.items()}
