"""The public attention operator."""

import torch

from adaptive_longformer.attention.autocast import autocast_inputs
from adaptive_longformer.attention.backends.choose import BACKENDS, choose_backend
from adaptive_longformer.attention.call import (
    AttentionCall,
    AttentionSpan,
    GlobalProjections,
    GlobalQKV,
)
from adaptive_longformer.attention.global_rows import limit_global_tokens
from adaptive_longformer.attention.reference import dense_probabilities
from adaptive_longformer.patterns.block_layout import BlockLayout, split_window
from adaptive_longformer.patterns.global_tokens import GlobalTokens
from adaptive_longformer.patterns.pattern import Pattern, union
from adaptive_longformer.patterns.sliding_window import SlidingWindow

# Rows of queries, which the kernels count with 32 bits.
MAX_ROWS = 2**31


def sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern_or_layout: Pattern | BlockLayout,
    *,
    attention_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    global_mask: torch.Tensor | None = None,
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
            Padding is not global, whatever this mask says.
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
        A row that sees nothing is zero, with an LSE of -inf and zero gradients.

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
    chosen = choose_backend(call, backend)
    if call.query.shape[2] == 0:
        # No backend needs to know how to reduce over no keys at all.
        output = call.query + call.key + call.value
        lse = torch.zeros(output.shape[:3], device=output.device)
    else:
        output, lse = chosen.run(call)
    if return_lse:
        assert lse is not None
        return output, lse
    return output


def attention_probabilities(
    query: torch.Tensor, key: torch.Tensor, pattern_or_layout: Pattern | BlockLayout, **options
) -> torch.Tensor:
    """The attention weights of `sparse_attention` as a dense tensor [batch, heads, length, length],
    without dropout.

    Takes the options of `sparse_attention` that shape the scores. Every row sums to 1, rows that
    see nothing to 0. Needs O(length^2) memory: for inspection.
    """
    return dense_probabilities(make_call(query, key, key, pattern_or_layout, **options))


def explain_backends(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern_or_layout: Pattern | BlockLayout,
    **options,
) -> dict[str, str | None]:
    """For each backend None if it can run this call of `sparse_attention`, or the reason why
    not.
    """
    call = make_call(query, key, value, pattern_or_layout, **options)
    return {name: backend.unsupported(call) for name, backend in BACKENDS.items()}


def make_call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern_or_layout: Pattern | BlockLayout,
    *,
    attention_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    global_mask: torch.Tensor | None = None,
    max_global_tokens: int | None = None,
    global_qkv: GlobalQKV | None = None,
    entry_bias: torch.Tensor | None = None,
    span: AttentionSpan | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
    return_lse: bool = False,
) -> AttentionCall:
    """Checks the arguments of `sparse_attention` and brings them into the one form that backends
    take.
    """
    query, key, value = autocast_inputs(query, key, value)
    if global_qkv is not None and not isinstance(global_qkv, GlobalProjections):
        query_global, key_global, value_global = autocast_inputs(*global_qkv)
        global_qkv = (query_global, key_global, value_global)
    key, value = _check_tensors(query, key, value)
    batch, heads, length, head_dim = query.shape
    _check_mask("attention_mask", attention_mask, query)
    _check_mask("global_mask", global_mask, query)
    if max_global_tokens is not None and max_global_tokens < 0:
        raise ValueError(f"max_global_tokens is {max_global_tokens}, None or >= 0 is needed")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}, a number from 0 to below 1 is allowed")
    if dropout_p > 0:
        if dropout_seed is None:
            raise ValueError(
                "dropout_seed is None, an int64 scalar tensor is needed with dropout_p > 0"
            )
        if (
            dropout_seed.shape != ()
            or dropout_seed.dtype != torch.int64
            or dropout_seed.device != query.device
        ):
            raise ValueError(
                f"dropout_seed has shape {tuple(dropout_seed.shape)}, dtype {dropout_seed.dtype} "
                "and device "
                f"{dropout_seed.device}, an int64 scalar tensor on {query.device} is needed"
            )
    pattern, layout = None, None
    if isinstance(pattern_or_layout, BlockLayout):
        layout = pattern_or_layout
        if layout.length != length:
            raise ValueError(f"layout is for length {layout.length}, query has length {length}")
        _check_device("layout.key_blocks", layout.key_blocks, query)
        _check_device("entry_bias", entry_bias, query)
        if not torch.compiler.is_compiling():
            layout.check_once()
        entry_bias = _combine_entry_bias(layout, entry_bias, batch, heads)
        window = layout.window
    elif isinstance(pattern_or_layout, Pattern):
        if entry_bias is not None:
            raise ValueError(
                "entry_bias is given with a pattern, a BlockLayout is needed to say what its "
                "entries are"
            )
        pattern, global_mask = _split_global_tokens(pattern_or_layout, global_mask, query)
        window = split_window(pattern)[0]
        _check_dilation(pattern, heads)
    else:
        raise ValueError(
            f"pattern_or_layout is a {type(pattern_or_layout).__name__}, a Pattern or BlockLayout "
            "is needed"
        )
    if span is not None:
        if window is None:
            raise ValueError(
                "span is given, but the pattern has no window without holes that it could narrow"
            )
        if span.length.shape != (heads,) or not span.ramp > 0:
            raise ValueError(
                f"span has length of shape {tuple(span.length.shape)} and ramp {span.ramp}, "
                f"length of shape ({heads},) and a ramp above 0 are needed"
            )
        _check_device("span.length", span.length, query)
    if global_mask is None:
        global_qkv = None
    elif attention_mask is not None:
        global_mask = global_mask & attention_mask
    if max_global_tokens is not None and global_mask is not None:
        global_mask = limit_global_tokens(global_mask, max_global_tokens)
    if isinstance(global_qkv, GlobalProjections):
        if global_qkv.hidden_states.shape[:2] != (batch, length):
            raise ValueError(
                f"global_qkv.hidden_states has shape {tuple(global_qkv.hidden_states.shape)}, "
                f"({batch}, {length}, hidden_size) is needed"
            )
    elif global_qkv is not None and any(tensor.shape != query.shape for tensor in global_qkv):
        raise ValueError(
            f"global_qkv has shapes {[tuple(tensor.shape) for tensor in global_qkv]}, three of "
            f"{tuple(query.shape)} are needed"
        )
    return AttentionCall(
        query=query,
        key=key,
        value=value,
        scale=head_dim**-0.5 if scale is None else float(scale),
        pattern=pattern,
        layout=layout,
        attention_mask=attention_mask,
        is_causal=is_causal,
        global_mask=global_mask,
        # On a CPU nobody waits for the number, and rows without a token cost time.
        max_global_tokens=None if query.device.type == "cpu" else max_global_tokens,
        global_qkv=global_qkv,
        entry_bias=entry_bias,
        span=span,
        dropout_p=float(dropout_p),
        dropout_seed=dropout_seed if dropout_p > 0 else None,
        return_lse=return_lse,
    )


def _check_tensors(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Checks shapes, types and devices; returns key and value with as many heads as the query."""
    if query.ndim != 4:
        raise ValueError(
            f"query has shape {tuple(query.shape)}, [batch, heads, length, head_dim] is needed"
        )
    batch, heads, length, head_dim = query.shape
    for name, tensor in (("key", key), ("value", value)):
        if (
            tensor.ndim != 4
            or (tensor.shape[0], tensor.shape[2], tensor.shape[3]) != (batch, length, head_dim)
            or tensor.shape[1] == 0
            or heads % tensor.shape[1] != 0
        ):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, ({batch}, a divisor of {heads}, "
                f"{length}, {head_dim}) is needed "
                "to match the query"
            )
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, query is {query.dtype} on "
                f"{query.device}: "
                "the same type and device are needed"
            )
    if not query.dtype.is_floating_point:
        raise ValueError(f"query has dtype {query.dtype}, a floating-point type is needed")
    if head_dim == 0:
        raise ValueError(f"query has shape {tuple(query.shape)}, a head_dim of 1 or more is needed")
    if batch * heads * length >= MAX_ROWS:
        raise ValueError(
            f"query has shape {tuple(query.shape)}, batch x heads x length = "
            f"{batch * heads * length}, less than 2**31 is allowed"
        )
    if key.shape[1] != heads:
        key = key.repeat_interleave(heads // key.shape[1], dim=1)
    if value.shape[1] != heads:
        value = value.repeat_interleave(heads // value.shape[1], dim=1)
    return key, value


def _check_mask(name: str, mask: torch.Tensor | None, query: torch.Tensor) -> None:
    if mask is None:
        return
    expected = (query.shape[0], query.shape[2])
    if mask.dtype != torch.bool or tuple(mask.shape) != expected or mask.device != query.device:
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)}, dtype {mask.dtype} and device {mask.device}, "
            f"a bool mask of shape {expected} on {query.device} is needed"
        )


def _check_device(name: str, tensor: torch.Tensor | None, query: torch.Tensor) -> None:
    if tensor is not None and tensor.device != query.device:
        raise ValueError(f"{name} is on {tensor.device}, query is on {query.device}")


def _combine_entry_bias(
    layout: BlockLayout, entry_bias: torch.Tensor | None, batch: int, heads: int
) -> torch.Tensor | None:
    """The layout's bias plus the caller's, after checking both against the call."""
    shape = layout.key_blocks.shape
    if shape[0] not in (1, batch) or shape[1] not in (1, heads):
        raise ValueError(
            f"layout has key_blocks of shape {tuple(shape)}, [1 or {batch}, 1 or {heads}, query "
            "blocks, entries] is needed"
        )
    if entry_bias is not None:
        fits = entry_bias.ndim == 4 and entry_bias.shape[2:] == shape[2:]
        if (
            not fits
            or entry_bias.shape[0] not in (1, batch)
            or entry_bias.shape[1] not in (1, heads)
        ):
            raise ValueError(
                f"entry_bias has shape {tuple(entry_bias.shape)}, [1 or {batch}, 1 or {heads}, "
                f"{shape[2]}, {shape[3]}] is needed"
            )
    if layout.bias is None:
        return entry_bias
    return layout.bias if entry_bias is None else layout.bias + entry_bias


def _split_global_tokens(
    pattern: Pattern, global_mask: torch.Tensor | None, query: torch.Tensor
) -> tuple[Pattern, torch.Tensor | None]:
    """Moves the pattern's global tokens into the mask."""
    fixed = [part for part in pattern.parts if isinstance(part, GlobalTokens)]
    if not fixed:
        return pattern, global_mask
    batch, _, length, _ = query.shape
    mask = torch.zeros(length, dtype=torch.bool, device=query.device)
    for part in fixed:
        mask = mask | part.mask(length, query.device)
    mask = mask.expand(batch, length)
    global_mask = mask if global_mask is None else global_mask | mask
    rest = union(tuple(part for part in pattern.parts if not isinstance(part, GlobalTokens)))
    if rest is None:
        raise ValueError(
            "pattern has only global tokens, add what the other tokens see, such as "
            "SlidingWindow(0)"
        )
    return rest, global_mask


def _check_dilation(pattern: Pattern, heads: int) -> None:
    for part in pattern.parts:
        if (
            isinstance(part, SlidingWindow)
            and isinstance(part.dilation, tuple)
            and len(part.dilation) != heads
        ):
            raise ValueError(
                f"SlidingWindow: dilation has {len(part.dilation)} numbers, one per head = "
                f"{heads} is needed"
            )
