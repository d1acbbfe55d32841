# type: ignore  (a kernel's types are Triton's)
"""Triton's kernels of the backward pass, without atomic sums: every sum has a fixed order.

`grad_queries` walks the lists as the forward pass does; `grad_list_parts` and `grad_packed_parts`
add up what many queries give to a key block, in parts of limited length; `grad_keys` adds these
parts to what the window gives.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from adaptive_longformer.attention.kernels.triton_key_tiles import (
    band_blocks,
    band_tile,
    listed_tile,
    lists_of_tile,
    packed_tile,
)
from adaptive_longformer.attention.kernels.triton_tiles import (
    KEY_TILE,
    LOG2_E,
    Sizes,
    band_reach,
    band_scores,
    column_words,
    is_band_edge,
    keep_factors,
    list_row,
    list_scores,
    load_rows,
    open_keys,
    packed_positions,
    packed_scores,
    place_of_program,
    product,
    row_words,
    span_slope,
    span_weight,
    store_rows,
)

QUERY_TILE = tl.constexpr(64)
# Tiles of queries that a program adds up of a packed block of global keys.
PACKED_PART = tl.constexpr(64)
_INFINITY = tl.constexpr(float("inf"))


class Upstream(NamedTuple):
    """What the gradients are computed from.

    Attributes:
        grad: of the output.
        row_lse: float32 [batch, heads, length], log-sum-exp in base 2, +inf without weights.
        row_delta: float32, as row_lse: sum(grad * output) less the gradient of the log-sum-exp.
    """

    grad: Any
    row_lse: Any
    row_delta: Any


class Parts(NamedTuple):
    """Sums of parts of key blocks, float32.

    Attributes:
        list_keys, list_values: [batch, heads, slots, KEY_BLOCK, head_dim].
        packed_keys, packed_values: [batch, heads, blocks of packed keys, parts, tile, head_dim].
    """

    list_keys: Any
    list_values: Any
    packed_keys: Any
    packed_values: Any


@triton.jit
def _score_gradients(call, scores, weight_gradients, rows, factors):
    """Weights that multiply the values, and gradients of scores.

    Args:
        rows: row_lse and row_delta in the shape of queries.
        factors: of dropout, or anything.
    """
    row_lse, row_delta = rows
    weights = tl.exp2(scores - row_lse)
    if call.dropout is not None:
        gradients = weights * (weight_gradients * factors - row_delta)
        weights = weights * factors
    else:
        gradients = weights * (weight_gradients - row_delta)
    return weights, gradients


@triton.jit
def _add_query_tile(call, total, scores, k, v, grad, rows, words, key):
    """Adds a tile of keys to the gradient of queries; returns it and the gradients of scores."""
    factors = 0.0
    if call.dropout is not None:
        columns = column_words(call.dropout, key)
        factors = keep_factors(call.dropout, words[:, None], columns[None, :])
    _, gradients = _score_gradients(call, scores, product(grad, v), rows, factors)
    return tl.dot(gradients.to(k.dtype), k, total, input_precision="ieee"), gradients


@triton.jit
def _store_bias_gradients(call, sizes, entries, gradients, grad_bias, tile, index):
    """Writes the sums of a tile of listed keys, one for each entry."""
    KEY_BLOCK: tl.constexpr = call.KEY_BLOCK
    GROUPS: tl.constexpr = call.GROUPS
    BLOCKS: tl.constexpr = KEY_TILE // KEY_BLOCK if KEY_BLOCK < KEY_TILE else 1
    gradients = tl.reshape(gradients, (GROUPS, call.QUERY_BLOCK, BLOCKS, KEY_BLOCK))
    sums = tl.sum(tl.sum(gradients, 3), 1)
    group = tl.arange(0, GROUPS)[:, None]
    item = index * BLOCKS + tl.arange(0, BLOCKS)[None, :]
    entry = tl.load(entries + item * GROUPS + group)
    block = tile * GROUPS + group
    tl.store(grad_bias + block * sizes.width + entry, sums, mask=entry >= 0)


@triton.jit
def _clear_bias_gradients(call, sizes, grad_bias, tile):
    """Entries of the window, of other masks and behind the end of a list have no gradient."""
    first = tile * call.GROUPS * sizes.width
    end = tl.cdiv(sizes.length, call.QUERY_BLOCK) * sizes.width
    end = tl.minimum(first + call.GROUPS * sizes.width, end)
    for start in range(first, end, 128):
        place = start + tl.arange(0, 128)
        tl.store(grad_bias + place, tl.zeros([128], tl.float32), mask=place < end)
    tl.debug_barrier()


@triton.jit
def _row_sums(call, sizes, upstream, output, lse, grad_lse, batch, head, row, query, grad):
    """Makes row_lse and row_delta of a tile and writes them; also which rows have weights."""
    D: tl.constexpr = call.HEAD_DIM
    is_row = query < sizes.length
    o = load_rows(output, batch, head, query, is_row, D)
    pointer = row * sizes.length + query
    row_lse = tl.load(lse + pointer, mask=is_row, other=-_INFINITY)
    delta = tl.sum(o.to(tl.float32) * grad.to(tl.float32), 1)
    delta -= tl.load(grad_lse + pointer, mask=is_row, other=0.0)
    is_used = row_lse != -_INFINITY
    if call.is_real is not None:
        # What padding holds, which may be NaN, has no weights.
        flag = tl.load(call.is_real + batch * sizes.length + query, mask=is_row, other=0)
        is_used = is_used & ((flag != 0) | (row_lse == row_lse))
    row_lse = tl.where(is_used, row_lse * LOG2_E, _INFINITY)
    delta = tl.where(is_used, delta, 0.0)
    tl.store(upstream.row_lse + pointer, row_lse, mask=is_row)
    tl.store(upstream.row_delta + pointer, delta, mask=is_row)
    return row_lse, delta, is_used


@triton.jit(do_not_specialize=["length", "num_packed", "width"])
def grad_queries(
    call, tiles, upstream, forward, grad_query, grad_bias, grad_span, length, num_packed, width
):
    """A program computes the gradients of a tile of queries, of their biases and their span.

    Args:
        forward: output, lse and the gradient of lse, float32 [batch, heads, length].
        grad_bias: float32 [batch, heads, query blocks, width], or None.
        grad_span: float32 [batch, heads, tiles], or None.
    """
    sizes = Sizes(length, num_packed, width)
    D: tl.constexpr = call.HEAD_DIM
    M: tl.constexpr = call.QUERY_BLOCK * call.GROUPS
    N: tl.constexpr = KEY_TILE if call.KEY_BLOCK < KEY_TILE else call.KEY_BLOCK
    batch, head, row, tile = place_of_program(call, tl.cdiv(length, M))
    query = tile * M + tl.arange(0, M)
    grad = load_rows(upstream.grad, batch, head, query, query < length, D)
    output, lse, grad_lse = forward
    row_lse, delta, is_used = _row_sums(
        call, sizes, upstream, output, lse, grad_lse, batch, head, row, query, grad
    )
    rows = (row_lse[:, None], delta[:, None])
    q = load_rows(call.query, batch, head, query, is_used & (query < length), D)
    grad = tl.where(is_used[:, None], grad, 0.0)
    words = query
    if call.dropout is not None:
        words = row_words(call.dropout, row, query)
    total = tl.zeros([M, triton.next_power_of_2(D)], tl.float32)

    if call.window is not None:
        span_sum = tl.zeros([M], tl.float32)
        first, end = band_blocks(call, sizes, head, tile)
        for block in range(first, end):
            key, k, v, scores = band_tile(call, sizes, q, batch, head, tile, block)
            total, gradients = _add_query_tile(call, total, scores, k, v, grad, rows, words, key)
            if call.span is not None:
                weight = span_weight(call.span, head, query[:, None], key[None, :])
                span_sum += tl.sum(gradients * span_slope(call.span, weight), 1)
        if call.span is not None:
            place = row * tl.cdiv(length, M) + tile
            tl.store(grad_span + place, tl.sum(span_sum, 0))
    if call.positions is not None:
        for start in range(0, num_packed, N):
            key, k, v, scores = packed_tile(call, sizes, q, batch, head, tile, start)
            total, _ = _add_query_tile(call, total, scores, k, v, grad, rows, words, key)
    if call.lists is not None:
        if call.bias is not None:
            grad_bias = grad_bias + row * tl.cdiv(length, call.QUERY_BLOCK) * width
            _clear_bias_gradients(call, sizes, grad_bias, tile)
        own, num_tiles = lists_of_tile(call, sizes, tiles, batch, head, tile)
        for index in range(num_tiles):
            key, k, v, scores = listed_tile(call, sizes, own, q, batch, head, tile, index)
            total, gradients = _add_query_tile(call, total, scores, k, v, grad, rows, words, key)
            if call.bias is not None:
                _store_bias_gradients(call, sizes, own[1], gradients, grad_bias, tile, index)
    store_rows(grad_query, batch, head, query, query < length, total * call.scale, D)


@triton.jit
def _load_queries(call, sizes, upstream, batch, head, row, query, is_query):
    """Queries, gradients of the output and row values [1, queries]."""
    D: tl.constexpr = call.HEAD_DIM
    pointer = row * sizes.length + query
    row_lse = tl.load(upstream.row_lse + pointer, mask=is_query, other=_INFINITY)
    delta = tl.load(upstream.row_delta + pointer, mask=is_query, other=0.0)
    is_used = is_query
    if call.is_real is not None:
        # Only what padding holds has to be kept out; the loads need not wait for row_lse otherwise.
        is_used = row_lse < _INFINITY
    q = load_rows(call.query, batch, head, query, is_used, D)
    grad = load_rows(upstream.grad, batch, head, query, is_used, D)
    return q, grad, (row_lse[None, :], delta[None, :])


@triton.jit
def _add_key_tile(call, sums, scores, q, grad, v, rows, row, query, key):
    """Adds a tile of queries to the gradients of keys and values; scores are [keys, queries]."""
    key_sum, value_sum = sums
    factors = 0.0
    if call.dropout is not None:
        columns = column_words(call.dropout, key)
        words = row_words(call.dropout, row, query)
        factors = keep_factors(call.dropout, words[None, :], columns[:, None])
    weights, gradients = _score_gradients(call, scores, product(v, grad), rows, factors)
    value_sum = tl.dot(weights.to(grad.dtype), grad, value_sum, input_precision="ieee")
    key_sum = tl.dot(gradients.to(q.dtype), q, key_sum, input_precision="ieee")
    return key_sum, value_sum


@triton.jit
def _add_readers(call, sizes, upstream, entries, sums, k, v, place, key, is_open, first, last):
    """Adds the readers from first to last of a key block; they are gathered to tiles of queries."""
    batch, head, row = place
    QUERY_BLOCK: tl.constexpr = call.QUERY_BLOCK
    GATHERED: tl.constexpr = QUERY_TILE // QUERY_BLOCK if QUERY_BLOCK < QUERY_TILE else 1
    lane = tl.arange(0, QUERY_BLOCK * GATHERED)
    first_key, last_key = tl.min(key, 0), tl.max(key, 0)
    num_query_blocks = tl.cdiv(sizes.length, QUERY_BLOCK)
    entries += list_row(call.lists, batch, head) * num_query_blocks * sizes.width
    for start in range(first, last, GATHERED):
        reader = start + lane // QUERY_BLOCK
        entry = tl.load(entries + reader, mask=reader < last, other=0)
        query = entry // sizes.width * QUERY_BLOCK + lane % QUERY_BLOCK
        is_query = (reader < last) & (query < sizes.length)
        q, grad, rows = _load_queries(call, sizes, upstream, batch, head, row, query, is_query)
        is_edge = start < 0
        if call.CAUSAL:
            is_edge = start >= 0
        if call.window is not None:
            # Readers are in ascending order.
            end = tl.minimum(start + GATHERED, last) - 1
            first_query = tl.load(entries + start) // sizes.width * QUERY_BLOCK
            last_query = tl.load(entries + end) // sizes.width * QUERY_BLOCK + QUERY_BLOCK - 1
            is_near = first_query <= last_key + call.window.left
            is_edge = is_edge | (is_near & (last_query >= first_key - call.window.right))
        scores = list_scores(
            call, product(k, q), query[None, :], key[:, None], is_open[:, None], is_edge
        )
        if call.bias is not None:
            bias = (
                call.bias + list_row(call.bias_rows, batch, head) * num_query_blocks * sizes.width
            )
            bias = tl.load(bias + entry, mask=reader < last, other=0.0)
            scores += bias[None, :] * LOG2_E
        sums = _add_key_tile(call, sums, scores, q, grad, v, rows, row, query, key)
    return sums


@triton.jit
def _no_sums(N: tl.constexpr, D: tl.constexpr):
    zeros = tl.zeros([N, triton.next_power_of_2(D)], tl.float32)
    return zeros, zeros


@triton.jit
def _store_part(keys, values, sums, slot, N: tl.constexpr, D: tl.constexpr):
    element = tl.arange(0, triton.next_power_of_2(D))[None, :]
    place = slot * N * D + tl.arange(0, N)[:, None] * D + element
    tl.store(keys + place, sums[0], mask=element < D)
    tl.store(values + place, sums[1], mask=element < D)


@triton.jit(do_not_specialize=["length", "num_packed", "width", "max_slots"])
def grad_list_parts(
    call, readers, upstream, parts, length, num_packed, width, max_slots, UNSPLIT: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """A program adds up one part of the readers of a key block, behind the first UNSPLIT ones."""
    sizes = Sizes(length, num_packed, width)
    D: tl.constexpr = call.HEAD_DIM
    N: tl.constexpr = call.KEY_BLOCK
    batch, head, row, slot = place_of_program(call, max_slots)
    num_key_blocks = tl.cdiv(length, N)
    list_of_row = list_row(call.lists, batch, head)
    starts = readers.starts + list_of_row * (num_key_blocks + 1)
    slot_starts = readers.slot_starts + list_of_row * (num_key_blocks + 1)
    if slot >= tl.load(slot_starts + num_key_blocks):
        return
    column = tl.load(readers.slot_columns + list_of_row * max_slots + slot)
    part = slot - tl.load(slot_starts + column)
    first = tl.load(starts + column) + UNSPLIT + part * PART
    last = tl.minimum(first + PART, tl.load(starts + column + 1))
    key = column * N + tl.arange(0, N)
    is_open = open_keys(call, sizes, batch, key)
    k = load_rows(call.key, batch, head, key, is_open, D)
    v = load_rows(call.value, batch, head, key, is_open, D)
    sums = _no_sums(N, D)
    place = (batch, head, row)
    sums = _add_readers(
        call, sizes, upstream, readers.entries, sums, k, v, place, key, is_open, first, last
    )
    _store_part(parts.list_keys, parts.list_values, sums, row * max_slots + slot, N, D)


@triton.jit(do_not_specialize=["length", "num_packed", "width"])
def grad_packed_parts(call, upstream, parts, length, num_packed, width):
    """A program adds up what a part of all queries gives to a tile of packed global keys."""
    sizes = Sizes(length, num_packed, width)
    D: tl.constexpr = call.HEAD_DIM
    num_tiles = tl.cdiv(length, QUERY_TILE)
    num_parts = tl.cdiv(num_tiles, PACKED_PART)
    num_packs = tl.cdiv(num_packed, KEY_TILE)
    batch, head, row, slot = place_of_program(call, num_packs * num_parts)
    column = slot // num_parts * KEY_TILE + tl.arange(0, KEY_TILE)
    key = packed_positions(call, sizes, batch, column)
    is_open = key < length
    k = load_rows(call.key, batch, head, key, is_open, D)
    v = load_rows(call.value, batch, head, key, is_open, D)
    sums = _no_sums(KEY_TILE, D)
    first = slot % num_parts * PACKED_PART
    for tile in range(first, tl.minimum(first + PACKED_PART, num_tiles)):
        query = tile * QUERY_TILE + tl.arange(0, QUERY_TILE)
        q, grad, rows = _load_queries(
            call, sizes, upstream, batch, head, row, query, query < length
        )
        scores = packed_scores(call, product(k, q), query[None, :], key[:, None], is_open[:, None])
        sums = _add_key_tile(call, sums, scores, q, grad, v, rows, row, query, key)
    slot = row * num_packs * num_parts + slot
    _store_part(parts.packed_keys, parts.packed_values, sums, slot, KEY_TILE, D)


@triton.jit
def _add_parts(
    keys, values, sums, first_slot, row_in_slot, num_slots, N: tl.constexpr, D: tl.constexpr
):
    """Adds parts to sums, in their order; each row of the sums has its own parts."""
    key_sum, value_sum = sums
    element = tl.arange(0, triton.next_power_of_2(D))[None, :]
    for part in range(tl.max(num_slots, 0)):
        slot = (first_slot + part) * N + row_in_slot
        is_read = (part < num_slots)[:, None] & (element < D)
        place = slot[:, None] * D + element
        key_sum += tl.load(keys + place, mask=is_read, other=0.0)
        value_sum += tl.load(values + place, mask=is_read, other=0.0)
    return key_sum, value_sum


@triton.jit
def _grad_of_key_tile(
    call, readers, upstream, parts, sizes, place, tile, max_slots, UNSPLIT: tl.constexpr
):
    """Positions and gradients of a tile of keys, and which of them to write."""
    batch, head, row = place
    D: tl.constexpr = call.HEAD_DIM
    KEY_BLOCK: tl.constexpr = call.KEY_BLOCK
    N: tl.constexpr = KEY_TILE if KEY_BLOCK < KEY_TILE else KEY_BLOCK
    column = tl.arange(0, N)
    key = tile * N + column
    last_key = tl.minimum(tile * N + N, sizes.length) - 1
    is_open = open_keys(call, sizes, batch, key)
    k = load_rows(call.key, batch, head, key, is_open, D)
    v = load_rows(call.value, batch, head, key, is_open, D)
    sums = _no_sums(N, D)
    if call.window is not None:
        left, right = band_reach(call, sizes, head)
        end = tl.minimum(last_key + left, sizes.length - 1) // QUERY_TILE + 1
        for block in range(tl.maximum(tile * N - right, 0) // QUERY_TILE, end):
            query = block * QUERY_TILE + tl.arange(0, QUERY_TILE)
            last_query = tl.minimum(block * QUERY_TILE + QUERY_TILE, sizes.length) - 1
            q, grad, rows = _load_queries(
                call, sizes, upstream, batch, head, row, query, query < sizes.length
            )
            is_edge = is_band_edge(
                call, sizes, block * QUERY_TILE, last_query, tile * N, tile * N + N - 1
            )
            scores = band_scores(
                call, product(k, q), head, query[None, :], key[:, None], is_open[:, None], is_edge
            )
            sums = _add_key_tile(call, sums, scores, q, grad, v, rows, row, query, key)
    if call.lists is not None:
        num_key_blocks = tl.cdiv(sizes.length, KEY_BLOCK)
        first_column = list_row(call.lists, batch, head) * (num_key_blocks + 1)
        if UNSPLIT > 0:
            first = tl.load(readers.starts + first_column + tile)
            last = tl.load(readers.starts + first_column + tile + 1)
            sums = _add_readers(
                call, sizes, upstream, readers.entries, sums, k, v, place, key, is_open, first,
                tl.minimum(first + UNSPLIT, last),
            )  # fmt: skip
        block = first_column + tl.minimum(key // KEY_BLOCK, num_key_blocks - 1)
        slot = tl.load(readers.slot_starts + block)
        num_slots = tl.load(readers.slot_starts + block + 1) - slot
        sums = _add_parts(
            parts.list_keys, parts.list_values, sums, row * max_slots + slot, column % KEY_BLOCK,
            num_slots, KEY_BLOCK, D,
        )  # fmt: skip
    is_written = key < sizes.length
    if call.is_global is not None:
        pointer = call.is_global + batch * sizes.length + key
        is_written = is_written & (tl.load(pointer, mask=is_written, other=1) == 0)
    return key, sums, is_written


@triton.jit
def _grad_of_packed_tile(call, parts, sizes, row, pack):
    """Columns and gradients of a tile of packed global keys."""
    D: tl.constexpr = call.HEAD_DIM
    num_packs = tl.cdiv(sizes.num_packed, KEY_TILE)
    num_parts = tl.cdiv(tl.cdiv(sizes.length, QUERY_TILE), PACKED_PART)
    column = tl.arange(0, KEY_TILE)
    slot = (row * num_packs + pack) * num_parts + column * 0
    sums = _no_sums(KEY_TILE, D)
    sums = _add_parts(
        parts.packed_keys, parts.packed_values, sums, slot, column, column * 0 + num_parts,
        KEY_TILE, D,
    )  # fmt: skip
    return pack * KEY_TILE + column, sums


@triton.jit
def _store_sums(call, grad_key, grad_value, batch, head, key, is_written, sums):
    D: tl.constexpr = call.HEAD_DIM
    store_rows(grad_key, batch, head, key, is_written, sums[0] * call.scale, D)
    store_rows(grad_value, batch, head, key, is_written, sums[1], D)


@triton.jit(do_not_specialize=["length", "num_packed", "width", "max_slots"])
def grad_keys(
    call, readers, upstream, parts, grad_key, grad_value, length, num_packed, width, max_slots,
    UNSPLIT: tl.constexpr,
):  # fmt: skip
    """A program writes the gradients of a tile of keys, or of packed global keys."""
    sizes = Sizes(length, num_packed, width)
    N: tl.constexpr = KEY_TILE if call.KEY_BLOCK < KEY_TILE else call.KEY_BLOCK
    num_key_tiles = tl.cdiv(length, N)
    num_packs = tl.cdiv(num_packed, KEY_TILE)
    batch, head, row, tile = place_of_program(call, num_key_tiles + num_packs)
    place = (batch, head, row)
    if tile < num_key_tiles:
        key, sums, is_written = _grad_of_key_tile(
            call, readers, upstream, parts, sizes, place, tile, max_slots, UNSPLIT
        )
        _store_sums(call, grad_key, grad_value, batch, head, key, is_written, sums)
    elif call.positions is not None:
        pack, packed_sums = _grad_of_packed_tile(call, parts, sizes, row, tile - num_key_tiles)
        position = packed_positions(call, sizes, batch, pack)
        is_token = position < length
        _store_sums(call, grad_key, grad_value, batch, head, position, is_token, packed_sums)
