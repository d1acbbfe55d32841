# type: ignore  (a kernel's types are Triton's)
"""Triton's kernel of the forward pass: block-sparse attention with an online softmax."""

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
    LN_2,
    Sizes,
    column_words,
    keep_factors,
    load_rows,
    place_of_program,
    row_words,
    store_rows,
)

_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _add_tile(call, state, scores, values, words, key):
    """Adds a tile of keys to the sum of values, the largest score and the sum of weights."""
    total, row_max, row_sum = state
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    shift = tl.where(new_max == -_INFINITY, 0.0, new_max)
    weights = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(row_max - shift)
    row_sum = row_sum * decay + tl.sum(weights, 1)
    if call.dropout is not None:
        columns = column_words(call.dropout, key)
        weights = weights * keep_factors(call.dropout, words[:, None], columns[None, :])
    total = tl.dot(weights.to(values.dtype), values, total * decay[:, None], input_precision="ieee")
    return total, new_max, row_sum


@triton.jit(do_not_specialize=["length", "num_packed", "width"])
def attention_forward(call, tiles, output, lse, length, num_packed, width):
    """A program computes the output and the log-sum-exp of one tile of queries."""
    sizes = Sizes(length, num_packed, width)
    D: tl.constexpr = call.HEAD_DIM
    M: tl.constexpr = call.QUERY_BLOCK * call.GROUPS
    N: tl.constexpr = KEY_TILE if call.KEY_BLOCK < KEY_TILE else call.KEY_BLOCK
    batch, head, row, tile = place_of_program(call, tl.cdiv(length, M))
    query = tile * M + tl.arange(0, M)
    q = load_rows(call.query, batch, head, query, query < length, D)
    words = query
    if call.dropout is not None:
        words = row_words(call.dropout, row, query)
    total = tl.zeros([M, triton.next_power_of_2(D)], tl.float32)
    state = (total, tl.full([M], -_INFINITY, tl.float32), tl.zeros([M], tl.float32))

    if call.window is not None:
        first, end = band_blocks(call, sizes, head, tile)
        for block in range(first, end):
            key, _, v, scores = band_tile(call, sizes, q, batch, head, tile, block)
            state = _add_tile(call, state, scores, v, words, key)
    if call.positions is not None:
        for start in range(0, num_packed, N):
            key, _, v, scores = packed_tile(call, sizes, q, batch, head, tile, start)
            state = _add_tile(call, state, scores, v, words, key)
    if call.lists is not None:
        own, num_tiles = lists_of_tile(call, sizes, tiles, batch, head, tile)
        for index in range(num_tiles):
            key, _, v, scores = listed_tile(call, sizes, own, q, batch, head, tile, index)
            state = _add_tile(call, state, scores, v, words, key)

    total, row_max, row_sum = state
    is_empty = row_sum == 0.0
    row_sum = tl.where(is_empty, 1.0, row_sum)
    store_rows(output, batch, head, query, query < length, total / row_sum[:, None], D)
    log_sum = tl.where(is_empty, -_INFINITY, row_max * LN_2 + tl.log(row_sum))
    tl.store(lse + row * length + query, log_sum, mask=query < length)
