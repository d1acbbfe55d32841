"""One call of the attention operator: checked once, then the same for every backend."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from typing_extensions import TypedDict, Unpack

from adaptive_longformer.attention.autocast import autocast_inputs
from adaptive_longformer.attention.global_keys import GlobalKeys, global_keys
from adaptive_longformer.patterns.block_layout import BlockLayout, block_layout, split_window
from adaptive_longformer.patterns.global_tokens import GlobalTokens
from adaptive_longformer.patterns.pattern import Pattern, check_types, check_whole, union
from adaptive_longformer.patterns.sliding_window import SlidingWindow

# Of the lists of a pattern, in tokens.
DEFAULT_BLOCK_SIZE = 64
# Rows of queries, which the kernels count with 32 bits.
MAX_ROWS = 2**31


class AttentionSpan(NamedTuple):
    """A learned window per head: weights exp(score) * clamp((ramp + length_h - |j - i|) / ramp, 0,
    1).

    Attributes:
        length: float [heads], tokens up to which the window keeps its full weight. Learnable.
        ramp: tokens over which the weight then falls to zero.

    Acts on the keys of the window only, never on global, selected or pattern keys.
    Source: Sukhbaatar et al. 2019, with an additive logarithm in place of the product.
    """

    length: torch.Tensor
    ramp: float


class GlobalProjections(NamedTuple):
    """The separate projections of Longformer's global queries, not yet applied.

    A backend computes only what the few global rows need: with fewer global tokens x heads than
    channels the key and value projections are absorbed into the query and the output, instead of
    projecting all tokens.

    Attributes:
        hidden_states: [batch, length, hidden_size].
        query_weight, key_weight, value_weight: [heads * head_dim, hidden_size], as nn.Linear stores
            them.
        query_bias, key_bias, value_bias: [heads * head_dim] or None.
    """

    hidden_states: torch.Tensor
    query_weight: torch.Tensor
    query_bias: torch.Tensor | None
    key_weight: torch.Tensor
    key_bias: torch.Tensor | None
    value_weight: torch.Tensor
    value_bias: torch.Tensor | None

    def project(self, num_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The explicit query, key and value of all tokens, each [batch, heads, length,
        head_dim].
        """

        def split(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            projected = torch.nn.functional.linear(self.hidden_states, weight, bias)
            return projected.unflatten(-1, (num_heads, -1)).transpose(1, 2)

        return (
            split(self.query_weight, self.query_bias),
            split(self.key_weight, self.key_bias),
            split(self.value_weight, self.value_bias),
        )


GlobalQKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor] | GlobalProjections


class AttentionOptions(TypedDict, total=False):
    """What `sparse_attention` takes besides tensors and pattern, and says the meaning of."""

    attention_mask: torch.Tensor | None
    is_causal: bool
    global_mask: torch.Tensor | GlobalKeys | None
    max_global_tokens: int | None
    global_qkv: GlobalQKV | None
    entry_bias: torch.Tensor | None
    span: AttentionSpan | None
    scale: float | None
    dropout_p: float
    dropout_seed: torch.Tensor | None
    return_lse: bool


_NO_OPTIONS: dict[str, Any] = {
    "attention_mask": None, "is_causal": False, "global_mask": None, "max_global_tokens": None,
    "global_qkv": None, "entry_bias": None, "span": None, "scale": None, "dropout_p": 0.0,
    "dropout_seed": None, "return_lse": False,
}  # fmt: skip


@dataclass(frozen=True)
class AttentionCall:
    """The checked arguments of `sparse_attention`.

    Exactly one of `pattern` (without global tokens, they are in `global_keys`) and `layout` is
    given; key and value have as many heads as the query; `entry_bias` includes the layout's own
    bias; `global_qkv` is None without `global_keys`, `dropout_seed` without dropout.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    pattern: Pattern | None = None
    layout: BlockLayout | None = None
    attention_mask: torch.Tensor | None = None
    is_causal: bool = False
    global_keys: GlobalKeys | None = None
    global_qkv: GlobalQKV | None = None
    entry_bias: torch.Tensor | None = None
    span: AttentionSpan | None = None
    dropout_p: float = 0.0
    dropout_seed: torch.Tensor | None = None
    return_lse: bool = False

    @property
    def global_mask(self) -> torch.Tensor | None:
        """bool [batch, length], True for a global token, which is no padding; None: none is."""
        return None if self.global_keys is None else self.global_keys.mask

    @property
    def block_sizes(self) -> tuple[int, int]:
        """Tokens of the query blocks and the key blocks of the lists."""
        if self.layout is None:
            return DEFAULT_BLOCK_SIZE, DEFAULT_BLOCK_SIZE
        return self.layout.query_block_size, self.layout.key_block_size

    def lists(self) -> BlockLayout:
        """The layout, or the lists of blocks of the pattern, which are kept."""
        if self.layout is not None:
            return self.layout
        assert self.pattern is not None
        heads, length = self.query.shape[1:3]
        return block_layout(
            self.pattern, length, query_block_size=DEFAULT_BLOCK_SIZE,
            key_block_size=DEFAULT_BLOCK_SIZE, num_heads=heads, device=self.query.device,
        )  # fmt: skip


def make_call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern_or_layout: Pattern | BlockLayout,
    **options: Unpack[AttentionOptions],
) -> AttentionCall:
    """Checks the arguments of `sparse_attention` and brings them into the one form that backends
    take.

    Raises:
        ValueError: an argument has a wrong shape, type or value; the message names it, its value
            and what is allowed.
        TypeError: there is no such option.
    """
    given = {**_NO_OPTIONS, **options}
    if len(given) != len(_NO_OPTIONS):
        raise TypeError(f"unknown options: {sorted(given.keys() - _NO_OPTIONS.keys())}")
    check_types({"query": query, "key": key, "value": value}, torch.Tensor, "a torch.Tensor")
    tensors = {name: given[name] for name in ("attention_mask", "entry_bias", "dropout_seed")}
    check_types(tensors, torch.Tensor | None, "a torch.Tensor or None")
    flags = {name: given[name] for name in ("is_causal", "return_lse")}
    check_types(flags, bool, "True or False")
    query, key, value = autocast_inputs(query, key, value)
    key, value = _check_tensors(query, key, value)
    attention_mask, entry_bias = given["attention_mask"], given["entry_bias"]
    _check_mask("attention_mask", attention_mask, query)
    dropout_p, dropout_seed = given["dropout_p"], given["dropout_seed"]
    _check_dropout(dropout_p, dropout_seed, query)
    pattern, layout, fixed = None, None, ()
    if isinstance(pattern_or_layout, BlockLayout):
        layout = pattern_or_layout
        entry_bias = _check_layout(layout, entry_bias, query)
    elif isinstance(pattern_or_layout, Pattern):
        if entry_bias is not None:
            raise ValueError(
                "entry_bias is given with a pattern, a BlockLayout is needed to say what its "
                "entries are"
            )
        pattern, fixed = _split_global_tokens(pattern_or_layout, query.shape[1])
    else:
        raise ValueError(
            f"pattern_or_layout is a {type(pattern_or_layout).__name__}, a Pattern or BlockLayout "
            "is needed"
        )
    if given["span"] is not None:
        check_types({"span": given["span"]}, AttentionSpan, "an AttentionSpan or None")
        _check_span(given["span"], pattern, layout, query)
    keys = _global_keys(
        given["global_mask"], fixed, attention_mask, given["max_global_tokens"], query
    )
    scale = given["scale"]
    if scale is not None and not _is_number(scale):
        raise ValueError(f"scale is {scale!r}, a finite number or None is needed")
    return AttentionCall(
        query=query,
        key=key,
        value=value,
        scale=query.shape[3] ** -0.5 if scale is None else float(scale),
        pattern=pattern,
        layout=layout,
        attention_mask=attention_mask,
        is_causal=given["is_causal"],
        global_keys=keys,
        global_qkv=None if keys is None else _check_global_qkv(given["global_qkv"], query),
        entry_bias=entry_bias,
        span=given["span"],
        dropout_p=float(dropout_p),
        dropout_seed=dropout_seed if dropout_p > 0 else None,
        return_lse=given["return_lse"],
    )


def _is_number(value: Any) -> bool:
    """Whether it is a finite real number."""
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and -math.inf < value < math.inf


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
                f"{length}, {head_dim}) is needed to match the query"
            )
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, query is {query.dtype} on "
                f"{query.device}: the same type and device are needed"
            )
    if not query.dtype.is_floating_point:
        raise ValueError(f"query has dtype {query.dtype}, a floating-point type is needed")
    if head_dim == 0:
        raise ValueError(f"query has shape {tuple(query.shape)}, a head_dim of 1 or more is needed")
    # A graph whose sizes are symbols would get this as a limit of its own.
    if not torch.compiler.is_exporting() and batch * heads * length >= MAX_ROWS:
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


def _check_dropout(dropout_p: float, seed: torch.Tensor | None, query: torch.Tensor) -> None:
    if not _is_number(dropout_p) or not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p!r}, a number from 0 to below 1 is allowed")
    if dropout_p == 0:
        return
    if seed is None:
        raise ValueError(
            "dropout_seed is None, an int64 scalar tensor is needed with dropout_p > 0"
        )
    if seed.shape != () or seed.dtype != torch.int64 or seed.device != query.device:
        raise ValueError(
            f"dropout_seed has shape {tuple(seed.shape)}, dtype {seed.dtype} and device "
            f"{seed.device}, an int64 scalar tensor on {query.device} is needed"
        )


def _check_layout(
    layout: BlockLayout, entry_bias: torch.Tensor | None, query: torch.Tensor
) -> torch.Tensor | None:
    """Checks the lists and the bias of their entries; returns that and the layout's own, added."""
    batch, heads, length, _ = query.shape
    if layout.length != length:
        raise ValueError(f"layout is for length {layout.length}, query has length {length}")
    if not torch.compiler.is_compiling():
        layout.check_once()
    _check_device("layout.key_blocks", layout.key_blocks, query)
    _check_device("entry_bias", entry_bias, query)
    shape = layout.key_blocks.shape
    if shape[0] not in (1, batch) or shape[1] not in (1, heads):
        raise ValueError(
            f"layout has key_blocks of shape {tuple(shape)}, [1 or {batch}, 1 or {heads}, query "
            "blocks, entries] is needed"
        )
    if entry_bias is not None:
        fits = entry_bias.ndim == 4 and entry_bias.shape[2:] == shape[2:]
        if not entry_bias.is_floating_point():
            raise ValueError(
                f"entry_bias has dtype {entry_bias.dtype}, a floating-point type is needed"
            )
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


def _split_global_tokens(pattern: Pattern, heads: int) -> tuple[Pattern, tuple[GlobalTokens, ...]]:
    """The pattern without its global tokens, and these."""
    fixed, others = [], []
    for part in pattern.parts:
        if isinstance(part, GlobalTokens):
            fixed.append(part)
            continue
        others.append(part)
        if not isinstance(part, SlidingWindow) or not isinstance(part.dilation, tuple):
            continue
        if len(part.dilation) != heads:
            raise ValueError(
                f"SlidingWindow: dilation has {len(part.dilation)} numbers, one per head = "
                f"{heads} is needed"
            )
    if not fixed:
        return pattern, ()
    rest = union(tuple(others))
    if rest is None:
        raise ValueError(
            "pattern has only global tokens, add what the other tokens see, such as "
            "SlidingWindow(0)"
        )
    return rest, tuple(fixed)


def _check_span(
    span: AttentionSpan, pattern: Pattern | None, layout: BlockLayout | None, query: torch.Tensor
) -> None:
    window = layout.window if layout is not None else None
    if pattern is not None:
        window = split_window(pattern)[0]
    if window is None:
        raise ValueError(
            "span is given, but the pattern has no window without holes that it could narrow"
        )
    heads = query.shape[1]
    check_types({"span.length": span.length}, torch.Tensor, "a torch.Tensor")
    is_ramp = _is_number(span.ramp) and span.ramp > 0
    if span.length.shape != (heads,) or not span.length.is_floating_point() or not is_ramp:
        raise ValueError(
            f"span has length of shape {tuple(span.length.shape)} and {span.length.dtype}, and "
            f"ramp {span.ramp!r}: floating-point length of shape ({heads},) and a finite ramp "
            "above 0 are needed"
        )
    _check_device("span.length", span.length, query)


def _global_keys(
    given: torch.Tensor | GlobalKeys | None,
    fixed: tuple[GlobalTokens, ...],
    attention_mask: torch.Tensor | None,
    max_global_tokens: int | None,
    query: torch.Tensor,
) -> GlobalKeys | None:
    """The global tokens of the mask and of the pattern; what is packed already stays as it is."""
    if max_global_tokens is not None:
        check_whole("sparse_attention", 0, max_global_tokens=max_global_tokens)
    keys = given if isinstance(given, GlobalKeys) else None
    mask = given if keys is None else keys.mask
    positions = None if keys is None else keys.positions
    assert not isinstance(mask, GlobalKeys)
    check_types({"global_mask": mask}, torch.Tensor | None, "a torch.Tensor, GlobalKeys or None")
    _check_mask("global_mask", mask, query)
    _check_device("global_mask.positions", positions, query)
    if not fixed and (given is None or isinstance(given, GlobalKeys)):
        return given
    batch, _, length, _ = query.shape
    for part in fixed:
        added = part.mask(length, query.device).expand(batch, length)
        mask = added if mask is None else mask | added
    assert mask is not None
    return global_keys(mask, attention_mask, max_global_tokens)


def _check_global_qkv(qkv: GlobalQKV | None, query: torch.Tensor) -> GlobalQKV | None:
    """Checks the separate projections, and brings those that are applied into autocast's type."""
    if qkv is None:
        return None
    if isinstance(qkv, GlobalProjections):
        _check_projections(qkv, query)
        return qkv
    if not isinstance(qkv, tuple | list) or len(qkv) != 3:
        raise ValueError(
            f"global_qkv is a {type(qkv).__name__}, three tensors or GlobalProjections are needed"
        )
    for name, tensor in zip(("query", "key", "value"), qkv, strict=True):
        name = f"global_qkv's {name}"
        check_types({name: tensor}, torch.Tensor, "a torch.Tensor")
        if tensor.shape != query.shape or not tensor.is_floating_point():
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and {tensor.dtype}, {tuple(query.shape)} "
                "and a floating-point type are needed"
            )
        _check_device(name, tensor, query)
    query_global, key_global, value_global = autocast_inputs(*qkv)
    return query_global, key_global, value_global


def _check_projections(projections: GlobalProjections, query: torch.Tensor) -> None:
    batch, heads, length, head_dim = query.shape
    states, size = projections.hidden_states, heads * head_dim
    check_types({"global_qkv.hidden_states": states}, torch.Tensor, "a torch.Tensor")
    if states.ndim != 3 or states.shape[:2] != (batch, length):
        raise ValueError(
            f"global_qkv.hidden_states has shape {tuple(states.shape)}, "
            f"({batch}, {length}, hidden_size) is needed"
        )
    for name, tensor in projections._asdict().items():
        if tensor is None and name.endswith("bias"):
            continue
        name = f"global_qkv.{name}"
        check_types({name: tensor}, torch.Tensor, "a torch.Tensor")
        assert tensor is not None
        shape = (size,) if name.endswith("bias") else (size, states.shape[2])
        if (tensor is not states and tensor.shape != shape) or not tensor.is_floating_point():
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and {tensor.dtype}, {shape} and a "
                "floating-point type are needed"
            )
        _check_device(name, tensor, query)
