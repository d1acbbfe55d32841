# type: ignore  (a kernel's types are Triton's)
"""What Triton's kernels share: a call's arguments, rows of tensors, which pairs a tile shows.

Positions come with the shape that they have in a tile: [queries, 1] and [1, keys], or the other
way round where a tile has the keys as its rows.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

WINDOW = tl.constexpr(2)
KEY_TILE = tl.constexpr(64)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
MIN_SPAN_WEIGHT = tl.constexpr(1e-6)
_INFINITY = tl.constexpr(float("inf"))
_GOLDEN = tl.constexpr(0x9E3779B1)
_MULTIPLIER_1 = tl.constexpr(0x7FEB352D)
_MULTIPLIER_2 = tl.constexpr(0x846CA68B)
_MULTIPLIER_2_SIGNED = tl.constexpr(0x846CA68B - 2**32)


class Rows(NamedTuple):
    """A tensor [batch, heads, length, head_dim] whose last dimension is contiguous.

    Strides are in elements; length * row_stride fits into 32 bits.
    """

    data: Any
    batch_stride: Any
    head_stride: Any
    row_stride: Any


class Window(NamedTuple):
    """The keys of a query: query - key <= left and key - query <= right."""

    left: Any
    right: Any


class Span(NamedTuple):
    """`AttentionSpan`; length is float32 [heads]."""

    length: Any
    ramp: Any


class Dropout(NamedTuple):
    """The seed, int64 [1], of which the words of attention/dropout.py are made."""

    seed: Any
    threshold: Any
    keep_factor: Any


class ListRows(NamedTuple):
    """The row of lists or biases of a batch row and a head; strides are 0 where it is shared."""

    batch_stride: Any
    head_stride: Any


class Call(NamedTuple):
    """An `AttentionCall`; what it does not have is None.

    Attributes:
        is_real: uint8 [batch, length], 0 for padding.
        is_global: uint8 [batch, length]; these keys are read through `positions` alone.
        positions: int64 [batch, num_packed] of global tokens, `length` where there is none.
        lists: the rows of the lists.
        bias: float32 [rows, query blocks, width].
        bias_rows: its rows.
        QUERY_BLOCK, KEY_BLOCK: tokens of the blocks of the lists.
        GROUPS: query blocks of a tile.
        HEAD_DIM, CAUSAL: of the call.
    """

    query: Any
    key: Any
    value: Any
    scale: Any
    heads: Any
    is_real: Any
    is_global: Any
    positions: Any
    window: Any
    span: Any
    dropout: Any
    lists: Any
    bias: Any
    bias_rows: Any
    QUERY_BLOCK: Any
    KEY_BLOCK: Any
    GROUPS: Any
    HEAD_DIM: Any
    CAUSAL: Any


class Sizes(NamedTuple):
    """What differs from call to call, for which no kernel is compiled anew.

    Attributes:
        length: tokens.
        num_packed: columns of the positions of global tokens.
        width: entries of the longest list.
    """

    length: Any
    num_packed: Any
    width: Any


@triton.jit
def place_of_program(call, tiles):
    """Batch row, head, both as one number (int64), and which of so many tiles this program has."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    return row // call.heads, row % call.heads, row, tl.program_id(0) % tiles


@triton.jit
def list_row(rows, batch, head):
    """The row of lists or biases of a batch row and a head."""
    return batch * rows.batch_stride + head * rows.head_stride


@triton.jit
def row_pointers(rows, batch, head, position, D: tl.constexpr):
    """Pointers [positions, D padded to a power of two]."""
    element = tl.arange(0, triton.next_power_of_2(D))
    first = rows.data + batch * rows.batch_stride + head * rows.head_stride
    return first + position[:, None] * rows.row_stride + element[None, :]


@triton.jit
def load_rows(rows, batch, head, position, is_loaded, D: tl.constexpr):
    """[positions, D padded], zeros where a row is not loaded."""
    is_read = is_loaded[:, None] & (tl.arange(0, triton.next_power_of_2(D)) < D)[None, :]
    return tl.load(row_pointers(rows, batch, head, position, D), mask=is_read, other=0.0)


@triton.jit
def store_rows(rows, batch, head, position, is_stored, values, D: tl.constexpr):
    """Writes float32 [positions, D padded] in the type of the tensor."""
    is_written = is_stored[:, None] & (tl.arange(0, triton.next_power_of_2(D)) < D)[None, :]
    pointers = row_pointers(rows, batch, head, position, D)
    tl.store(pointers, values.to(rows.data.dtype.element_ty), mask=is_written)


@triton.jit
def open_keys(call, sizes, batch, position):
    """Which positions hold a key that is neither padding nor global, nor behind the end."""
    is_open = position < sizes.length
    pointer = batch * sizes.length + position
    if call.is_real is not None:
        is_open = is_open & (tl.load(call.is_real + pointer, mask=is_open, other=0) != 0)
    if call.is_global is not None:
        is_open = is_open & (tl.load(call.is_global + pointer, mask=is_open, other=1) == 0)
    return is_open


@triton.jit
def packed_positions(call, sizes, batch, column):
    """The positions of columns of packed global keys, the length where there is none."""
    pointers = call.positions + batch * sizes.num_packed + column
    is_column = column < sizes.num_packed
    return tl.load(pointers, mask=is_column, other=sizes.length).to(tl.int32)


@triton.jit
def band_reach(call, sizes, head):
    """How many tokens to the left and to the right a query sees in its window, at most."""
    left = tl.minimum(call.window.left, sizes.length)
    right = tl.minimum(call.window.right, sizes.length)
    if call.CAUSAL:
        right = tl.minimum(right, 0)
    if call.span is not None:
        reach = tl.load(call.span.length + head) + call.span.ramp
        reach = tl.minimum(tl.maximum(reach, 0.0), sizes.length * 1.0).to(tl.int32)
        left = tl.minimum(left, reach)
        right = tl.minimum(right, reach)
    return left, right


@triton.jit
def span_weight(span, head, query, key):
    """The weight of the learned window for pairs, not clamped."""
    distance = tl.abs(key - query).to(tl.float32)
    return (tl.load(span.length + head) + span.ramp - distance) / span.ramp


@triton.jit
def span_log2(weight):
    """Its logarithm in base 2."""
    return tl.where(weight > 0, tl.log2(tl.clamp(weight, MIN_SPAN_WEIGHT, 1.0)), -_INFINITY)


@triton.jit
def span_slope(span, weight):
    """The derivative of its natural logarithm by the length of the span."""
    is_flat = (weight < MIN_SPAN_WEIGHT) | (weight > 1.0)
    return tl.where(is_flat, 0.0, 1.0 / (tl.where(is_flat, 1.0, weight) * span.ramp))


@triton.jit
def product(a, b):
    """a b^T in float32."""
    return tl.dot(a, tl.trans(b), input_precision="ieee")


@triton.jit
def is_band_edge(call, sizes, first_query, last_query, first_key, last_key):
    """Whether some pair of a tile lies outside of the window, in the future or behind the end."""
    is_edge = (first_key < last_query - call.window.left) | (last_key >= sizes.length)
    is_edge = is_edge | (last_key > call.window.right + first_query)
    if call.CAUSAL:
        is_edge = is_edge | (last_key > first_query)
    return is_edge


@triton.jit
def band_scores(call, scores, head, query, key, is_open, is_edge):
    """Scores in base 2 of a tile of the window; -inf for pairs that are not seen."""
    scores = scores * (call.scale * LOG2_E)
    if call.span is not None:
        scores += span_log2(span_weight(call.span, head, query, key))
    if is_edge:
        offset = key - query
        is_seen = (offset >= -call.window.left) & (offset <= call.window.right) & is_open
        if call.CAUSAL:
            is_seen = is_seen & (offset <= 0)
        scores = tl.where(is_seen, scores, -_INFINITY)
    elif (call.is_real is not None) or (call.is_global is not None):
        scores = tl.where(is_open, scores, -_INFINITY)
    return scores


@triton.jit
def packed_scores(call, scores, query, key, is_open):
    """Scores in base 2 of a tile of packed global keys; -inf for pairs that are not seen."""
    if call.CAUSAL:
        is_open = is_open & (key <= query)
    return tl.where(is_open, scores * (call.scale * LOG2_E), -_INFINITY)


@triton.jit
def list_scores(call, scores, query, key, is_seen, is_edge):
    """Scores in base 2 of a tile of listed keys, without their bias; -inf for pairs that are not
    seen: neither is_seen, nor, at an edge, outside of the window and not in the future.
    """
    if is_edge:
        offset = key - query
        if call.window is not None:
            is_near = (offset >= -call.window.left) & (offset <= call.window.right)
            scores = tl.where(is_near, -_INFINITY, scores)
        if call.CAUSAL:
            scores = tl.where(offset <= 0, scores, -_INFINITY)
    return tl.where(is_seen, scores * (call.scale * LOG2_E), -_INFINITY)


@triton.jit
def mix(word):
    """`mix` of patterns/mixing.py on uint32."""
    word = (word ^ (word >> 16)) * _MULTIPLIER_1
    word = (word ^ (word >> 15)) * _MULTIPLIER_2
    return word ^ (word >> 16)


@triton.jit
def row_words(dropout, row, position):
    """`row_keys` of attention/dropout.py for positions of the row batch * heads + head."""
    seed = tl.load(dropout.seed)
    first = mix((seed + row * _GOLDEN).to(tl.uint32))
    second = mix((seed >> 32).to(tl.uint32) ^ first)
    return mix(mix(position.to(tl.uint32) + first) ^ second).to(tl.int32)


@triton.jit
def column_words(dropout, position):
    """`column_keys` of attention/dropout.py for positions."""
    seed = tl.load(dropout.seed)
    first = mix((seed ^ _GOLDEN).to(tl.uint32))
    second = mix((seed >> 32).to(tl.uint32) + first)
    return mix(mix(position.to(tl.uint32) + first) ^ second).to(tl.int32)


@triton.jit
def keep_factors(dropout, rows, columns):
    """0 for dropped pairs, else the factor of those that stay; words are shaped as positions."""
    word = (rows ^ columns) * _MULTIPLIER_1
    word = (word ^ (word >> 15)) * _MULTIPLIER_2_SIGNED
    return tl.where((word >> 1) >= dropout.threshold, dropout.keep_factor, 0.0)
