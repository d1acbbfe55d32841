# type: ignore  (a kernel's types are Triton's)
"""Tiles of keys for a tile of queries: of the band of its window, of packed global keys, and of
lists, where smaller blocks are gathered to one tile.

Each gives the positions, the keys and values, and the scores in base 2.
"""

import triton
import triton.language as tl

from adaptive_longformer.attention.kernels.triton_lists import list_room
from adaptive_longformer.attention.kernels.triton_tiles import (
    KEY_TILE,
    LOG2_E,
    band_reach,
    band_scores,
    is_band_edge,
    list_row,
    list_scores,
    load_rows,
    open_keys,
    packed_positions,
    packed_scores,
    product,
)

_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def band_blocks(call, sizes, head, tile):
    """The first block of keys that a tile of queries sees in its window, and the one behind the
    last.
    """
    M: tl.constexpr = call.QUERY_BLOCK * call.GROUPS
    N: tl.constexpr = KEY_TILE if call.KEY_BLOCK < KEY_TILE else call.KEY_BLOCK
    left, right = band_reach(call, sizes, head)
    last_query = tl.minimum(tile * M + M, sizes.length) - 1
    end = tl.minimum(last_query + right, sizes.length - 1) // N + 1
    return tl.maximum(tile * M - left, 0) // N, end


@triton.jit
def band_tile(call, sizes, q, batch, head, tile, block):
    """The keys of a block of the window."""
    D: tl.constexpr = call.HEAD_DIM
    M: tl.constexpr = call.QUERY_BLOCK * call.GROUPS
    N: tl.constexpr = KEY_TILE if call.KEY_BLOCK < KEY_TILE else call.KEY_BLOCK
    query = tile * M + tl.arange(0, M)
    key = block * N + tl.arange(0, N)
    is_open = open_keys(call, sizes, batch, key)
    k = load_rows(call.key, batch, head, key, is_open, D)
    v = load_rows(call.value, batch, head, key, is_open, D)
    last_query = tl.minimum(tile * M + M, sizes.length) - 1
    is_edge = is_band_edge(call, sizes, tile * M, last_query, block * N, block * N + N - 1)
    scores = band_scores(
        call, product(q, k), head, query[:, None], key[None, :], is_open[None, :], is_edge
    )
    return key, k, v, scores


@triton.jit
def packed_tile(call, sizes, q, batch, head, tile, start):
    """The packed global keys from a column on."""
    D: tl.constexpr = call.HEAD_DIM
    M: tl.constexpr = call.QUERY_BLOCK * call.GROUPS
    N: tl.constexpr = KEY_TILE if call.KEY_BLOCK < KEY_TILE else call.KEY_BLOCK
    query = tile * M + tl.arange(0, M)
    key = packed_positions(call, sizes, batch, start + tl.arange(0, N))
    is_open = key < sizes.length
    k = load_rows(call.key, batch, head, key, is_open, D)
    v = load_rows(call.value, batch, head, key, is_open, D)
    scores = packed_scores(call, product(q, k), query[:, None], key[None, :], is_open[None, :])
    return key, k, v, scores


@triton.jit
def lists_of_tile(call, sizes, tiles, batch, head, tile):
    """Of one tile of queries the items, their entries and the number of tiles of keys that are all
    seen, and how many tiles of keys there are in all.
    """
    KEY_BLOCK: tl.constexpr = call.KEY_BLOCK
    GROUPS: tl.constexpr = call.GROUPS
    BLOCKS: tl.constexpr = KEY_TILE // KEY_BLOCK if KEY_BLOCK < KEY_TILE else 1
    num_tiles = tl.cdiv(sizes.length, call.QUERY_BLOCK * GROUPS)
    index = list_row(call.lists, batch, head) * num_tiles + tile
    room = list_room(sizes.width, KEY_BLOCK, GROUPS)
    num_plain = tl.load(tiles.counts + index * 2) // BLOCKS
    num_key_tiles = tl.cdiv(tl.load(tiles.counts + index * 2 + 1), BLOCKS)
    items = tiles.items + index * room
    entries = items
    if tiles.entries is not None:
        entries = tiles.entries + index * room * GROUPS
    return (items, entries, num_plain), num_key_tiles


@triton.jit
def _listed_keys(call, items, index, column):
    """Of a tile of keys: their positions, and the bits of the query blocks that see them."""
    KEY_BLOCK: tl.constexpr = call.KEY_BLOCK
    BLOCKS: tl.constexpr = KEY_TILE // KEY_BLOCK if KEY_BLOCK < KEY_TILE else 1
    item = tl.load(items + index * BLOCKS + column // KEY_BLOCK)
    return (item // 16) * KEY_BLOCK + column % KEY_BLOCK, item % 16


@triton.jit
def _add_bias(call, sizes, entries, scores, batch, head, query, index, column):
    """Adds the biases of entries to a tile of listed keys, -inf where there is no entry."""
    KEY_BLOCK: tl.constexpr = call.KEY_BLOCK
    GROUPS: tl.constexpr = call.GROUPS
    BLOCKS: tl.constexpr = KEY_TILE // KEY_BLOCK if KEY_BLOCK < KEY_TILE else 1
    item = index * BLOCKS + column // KEY_BLOCK
    block = query // call.QUERY_BLOCK
    if GROUPS == 1:
        block = tl.min(block, 0)
        entry = tl.load(entries + item)
    else:
        entry = tl.load(entries + item[None, :] * GROUPS + (block % GROUPS)[:, None])
        block = block[:, None]
    num_query_blocks = tl.cdiv(sizes.length, call.QUERY_BLOCK)
    first = list_row(call.bias_rows, batch, head) * num_query_blocks
    pointer = call.bias + (first + block) * sizes.width + entry
    # Where a query block lies behind the end, there is no entry.
    bias = tl.load(pointer, mask=entry >= 0, other=-_INFINITY) * LOG2_E
    if GROUPS == 1:
        bias = bias[None, :]
    return scores + bias


@triton.jit
def _seen_keys(call, bits, is_open, query):
    """Which pairs of a tile of listed keys are seen by lists and masks."""
    if call.GROUPS == 1:
        is_seen = (is_open & (bits != 0))[None, :]
    else:
        bits = tl.where(is_open, bits, 0)
        group = (query // call.QUERY_BLOCK) % call.GROUPS
        is_seen = ((bits[None, :] >> group[:, None]) & 1) != 0
    return is_seen


@triton.jit
def listed_tile(call, sizes, own, q, batch, head, tile, index):
    """The keys of a tile of the lists of `lists_of_tile`."""
    items, entries, num_plain = own
    D: tl.constexpr = call.HEAD_DIM
    M: tl.constexpr = call.QUERY_BLOCK * call.GROUPS
    N: tl.constexpr = KEY_TILE if call.KEY_BLOCK < KEY_TILE else call.KEY_BLOCK
    query = tile * M + tl.arange(0, M)
    column = tl.arange(0, N)
    key, bits = _listed_keys(call, items, index, column)
    is_open = open_keys(call, sizes, batch, key) & (bits != 0)
    k = load_rows(call.key, batch, head, key, is_open, D)
    v = load_rows(call.value, batch, head, key, is_open, D)
    is_seen = _seen_keys(call, bits, is_open, query)
    scores = list_scores(
        call, product(q, k), query[:, None], key[None, :], is_seen, index >= num_plain
    )
    if call.bias is not None:
        scores = _add_bias(call, sizes, entries, scores, batch, head, query, index, column)
    return key, k, v, scores
