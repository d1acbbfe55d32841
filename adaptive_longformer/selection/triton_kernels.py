# type: ignore  (a kernel's types are Triton's)
"""The kernels of `triton_select.py`, which says what they are for and what their arguments are.

`pair` is batch row * heads + head. Scores and sums are base-2 logarithms. Candidates of a
query block are numbered: blocks of places come first, those near it behind them.
"""

import triton
import triton.language as tl

from adaptive_longformer.attention.kernels.triton_tiles import mix

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _end_of(inputs, sizes, batch, tile: tl.constexpr):
    """One more than the last token that may be chosen for somebody."""
    end = sizes.length
    if not tile.is_causal and inputs.ends is not None:
        end = tl.load(inputs.ends + batch).to(tl.int32)
    return end


@triton.jit
def _covered_range(sizes, row, end, tile: tl.constexpr):
    """As of `exact.py`, for query blocks of the call."""
    start = (row + sizes.first_row) * tile.query_block_size
    last_query = start + tile.query_block_size - 1
    if tile.is_causal:
        last = start // tile.block_size - 1
    else:
        last_query = tl.minimum(last_query, end - 1)
        reach = start + sizes.right
        last = (reach + 1) // tile.block_size - 1
        last = tl.where(reach < end - 1, last, sizes.num_key_blocks - 1)
    first = (tl.maximum(last_query - sizes.left, 0) + tile.block_size - 1) // tile.block_size
    return first, last


@triton.jit
def _places_of(inputs, sizes, pair, row, end, tile: tl.constexpr):
    """The places of a query block: where they are in memory, their count (-1: all blocks are
    candidates), and the first and one more than the last of the blocks near it.
    """
    at = pair.to(tl.int64)
    count, near, near_end = -1, 0, 0
    if inputs.places is not None:
        row = tl.minimum(row, sizes.num_rows - 1)
        at = at * sizes.num_rows + row
        count = tl.load(inputs.place_counts + at)
        near, near_end = _covered_range(sizes, row, end, tile)
        near_end += 1
        if tile.is_causal:
            # No place that the query block begins in was a choice.
            start = (row + sizes.first_row) * tile.query_block_size
            place = start // (tile.block_size * tile.blocks_per_place)
            near = tl.minimum(near, place * tile.blocks_per_place)
        near = tl.minimum(near, near_end)
    return at, count, near, near_end


@triton.jit
def _num_used(sizes, row, count, end, tile: tl.constexpr):
    """How many candidates may be there, of query blocks up to one."""
    blocks = tl.cdiv(end, tile.block_size)
    if tile.is_causal:
        row = tl.minimum(row, sizes.num_rows - 1)
        blocks = (row + sizes.first_row) * tile.query_block_size // tile.block_size
    return tl.where(count < 0, tl.minimum(blocks, sizes.num_candidates), sizes.num_placed)


@triton.jit
def _blocks_of(inputs, sizes, places_of, index, tile: tl.constexpr):
    """The blocks that candidates are; `num_key_blocks` or more where there is none."""
    at, count, near, near_end = places_of
    block = index
    if inputs.places is not None:
        nothing = sizes.num_key_blocks
        place = index // tile.blocks_per_place
        is_place = place < count
        number = tl.load(inputs.places + at * sizes.num_places + place, mask=is_place, other=0)
        far = number * tile.blocks_per_place + index % tile.blocks_per_place
        is_far = is_place & ((far < near) | (far >= near_end))
        near_block = near + index - sizes.num_places * tile.blocks_per_place
        is_near = (near_block >= near) & (near_block < near_end)
        near_block = tl.where(is_near, near_block, nothing)
        block = tl.where(count < 0, index, tl.where(is_far, far, near_block))
    return block


@triton.jit
def _load_queries(inputs, sizes, pair, tile_number, tile: tl.constexpr):
    """The queries of a tile, zeros for those that do not vote or vote beside a bad one; their
    numbers and query blocks; and the share of each in the vote, 0 for the former.
    """
    slot = tl.arange(0, tile.queries)
    row_slot, in_block = slot // tile.query_slots, slot % tile.query_slots
    row = tile_number * tile.rows + row_slot
    index = (row - tile.is_causal) * tile.query_block_size + in_block
    is_there = (row_slot < tile.rows) & (in_block < tile.query_block_size)
    is_there = is_there & (index >= 0) & (index < sizes.query_length)
    is_voter = is_there & (row < sizes.num_rows)
    batch, head = pair // sizes.heads, pair % sizes.heads
    if inputs.voters is not None:
        token = index + sizes.length - sizes.query_length
        voters = inputs.voters + batch.to(tl.int64) * inputs.voters_batch
        is_voter = is_voter & (tl.load(voters + token, mask=is_voter, other=0) != 0)
    start = inputs.query + batch.to(tl.int64) * inputs.query_batch
    start += head.to(tl.int64) * inputs.query_head
    dim = tl.arange(0, tile.dim_slots)
    query = tl.load(
        start + index.to(tl.int64)[:, None] * inputs.query_token + dim[None, :],
        mask=is_voter[:, None] & (dim < tile.head_dim)[None, :],
        other=0.0,
    )
    is_bad = tl.max((~(tl.abs(query) < float("inf"))).to(tl.int32), axis=1)
    shape: tl.constexpr = (tile.row_slots, tile.query_slots)
    is_bad = tl.max(is_bad.reshape(shape), axis=1)
    count = tl.sum(is_voter.to(tl.int32).reshape(shape), axis=1)
    vote = tl.where(is_bad == 0, 1.0 / tl.maximum(count, 1).to(tl.float32), 0.0)
    vote = vote[:, None].broadcast_to(shape).reshape((tile.queries,))
    vote = tl.where(is_voter, vote, 0.0)
    return tl.where((vote > 0)[:, None], query, 0.0), index, row, is_there, vote


@triton.jit
def _load_keys(inputs, batch, key_head, number, is_key, tile: tl.constexpr):
    """Keys by their numbers, zeros where there is none: [head_dim, keys]."""
    start = inputs.key + batch.to(tl.int64) * inputs.key_batch
    start += key_head.to(tl.int64) * inputs.key_head
    dim = tl.arange(0, tile.dim_slots)
    return tl.load(
        start + number.to(tl.int64)[None, :] * inputs.key_token + dim[:, None],
        mask=is_key[None, :] & (dim < tile.head_dim)[:, None],
        other=0.0,
    )


@triton.jit
def _scores(inputs, sizes, weights, pair, query, row, places_of, first, tile: tl.constexpr):
    """Scores of the candidates from one on, with the logarithms of counts; -inf for none."""
    slot = tl.arange(0, tile.keys)
    block = _blocks_of(inputs, sizes, places_of, first + slot // tile.key_slots, tile)
    in_block = slot % tile.key_slots
    key_number = block * tile.keys_per_block + in_block
    is_key = (block < sizes.num_key_blocks) & (in_block < tile.keys_per_block)
    is_key = is_key & (key_number < sizes.num_keys)
    batch, key_head = pair // sizes.heads, pair % sizes.heads // sizes.heads_per_key_head
    key_heads = sizes.heads // sizes.heads_per_key_head
    weights += (batch * key_heads + key_head).to(tl.int64) * sizes.num_keys
    weight = tl.load(weights + key_number, mask=is_key, other=float("-inf"))
    key = _load_keys(inputs, batch, key_head, key_number, is_key, tile)
    scores = tl.dot(query, key, input_precision="ieee") * (sizes.scale * _LOG2E)
    is_seen = (weight > float("-inf"))[None, :]
    if tile.is_causal:
        start_of_row = (row + sizes.first_row) * tile.query_block_size
        is_seen = is_seen & (((block + 1) * tile.block_size)[None, :] <= start_of_row[:, None])
    return tl.where(is_seen, scores + weight[None, :], float("-inf"))


@triton.jit
def _global_scores(inputs, sizes, pair, query, row, first, tile: tl.constexpr):
    """Scores of the global tokens from one on."""
    slot = first + tl.arange(0, 16)
    is_key = slot < sizes.num_global
    batch, key_head = pair // sizes.heads, pair % sizes.heads // sizes.heads_per_key_head
    positions = inputs.global_positions + batch.to(tl.int64) * inputs.positions_batch
    position = tl.load(positions + slot, mask=is_key, other=sizes.length)
    is_key = position < sizes.length
    global_keys = inputs.global_keys + batch.to(tl.int64) * inputs.global_keys_batch
    number = tl.load(global_keys + slot, mask=is_key, other=0)
    key = _load_keys(inputs, batch, key_head, number, is_key, tile)
    is_bad = tl.max((~(tl.abs(key) < float("inf"))).to(tl.int32), axis=0)
    scores = tl.dot(query, key, input_precision="ieee") * (sizes.scale * _LOG2E)
    is_seen = (is_key & (is_bad == 0))[None, :]
    if tile.is_causal:
        start_of_row = (row + sizes.first_row) * tile.query_block_size
        is_seen = is_seen & (position[None, :] < start_of_row[:, None])
    return tl.where(is_seen, scores, float("-inf"))


@triton.jit
def _log_rest(inputs, sizes, pair, index, count, vote):
    """The logarithm of what is in no place."""
    rest = tl.full(index.shape, float("-inf"), tl.float32)
    if inputs.places is not None:
        start = inputs.log_rest + pair.to(tl.int64) * sizes.query_length
        rest = tl.load(start + index, mask=vote > 0, other=float("-inf")).to(tl.float32) * _LOG2E
        rest = tl.where(count < 0, float("-inf"), rest)
    return rest


@triton.jit
def _add(peak, total, scores):
    """A running peak and the sum of 2**(score - peak), with more scores."""
    higher = tl.maximum(peak, tl.max(scores, axis=1))
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    total = total * tl.exp2(peak - shift) + tl.sum(tl.exp2(scores - shift[:, None]), axis=1)
    return higher, total


@triton.jit
def _block_sums(scores, peak, tile: tl.constexpr):
    """Sums of 2**(score - peak) over the keys of a block: [queries, blocks]."""
    weights = tl.exp2(scores - peak[:, None])
    return tl.sum(weights.reshape((tile.queries, tile.blocks, tile.key_slots)), axis=2)


@triton.jit
def _sum_of_rows(values, tile: tl.constexpr):
    """Sums over the queries of a query block: [rows, any]."""
    shape: tl.constexpr = (tile.row_slots, tile.query_slots, values.shape[1])
    return tl.sum(values.reshape(shape), axis=1)


@triton.jit(do_not_specialize=["sizes"])
def weights_kernel(inputs, sizes, weights, tile: tl.constexpr):
    """Writes weights [batch, key_heads, num_keys], for a tile of blocks."""
    tiles = tl.cdiv(sizes.num_key_blocks, tile.blocks)
    pair, tile_number = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    key_heads = sizes.heads // sizes.heads_per_key_head
    batch, key_head = (pair // key_heads).to(tl.int64), (pair % key_heads).to(tl.int64)
    slot = tl.arange(0, tile.keys)
    block, in_block = tile_number * tile.blocks + slot // tile.key_slots, slot % tile.key_slots
    key_number = block * tile.keys_per_block + in_block
    is_key = (in_block < tile.keys_per_block) & (key_number < sizes.num_keys)
    count = tl.full((tile.keys,), 1.0, tl.float32)
    if inputs.key_counts is not None:
        counts = inputs.key_counts + batch * inputs.counts_batch
        count = tl.load(counts + key_number, mask=is_key, other=0.0).to(tl.float32)
    is_key = is_key & (count > 0)
    dim = tl.arange(0, tile.dim_slots)
    start = inputs.key + batch * inputs.key_batch + key_head * inputs.key_head
    key = tl.load(
        start + key_number.to(tl.int64)[:, None] * inputs.key_token + dim[None, :],
        mask=is_key[:, None] & (dim < tile.head_dim)[None, :],
        other=0.0,
    )
    is_bad = tl.max((~(tl.abs(key) < float("inf"))).to(tl.int32), axis=1)
    shape: tl.constexpr = (tile.blocks, tile.key_slots)
    is_bad = tl.max(is_bad.reshape(shape), axis=1)[:, None].broadcast_to(shape)
    is_counted = is_key & (is_bad.reshape((tile.keys,)) == 0)
    weight = tl.where(is_counted, tl.log2(tl.where(is_counted, count, 1.0)), float("-inf"))
    is_there = (in_block < tile.keys_per_block) & (key_number < sizes.num_keys)
    tl.store(weights + pair.to(tl.int64) * sizes.num_keys + key_number, weight, mask=is_there)


@triton.jit(do_not_specialize=["sizes"])
def masses_kernel(inputs, sizes, weights, masses, of_globals, peaks, tile: tl.constexpr):
    """Writes masses [pairs, rows, num_candidates] of the pairs from `first_pair` on, undefined from
    the number in use on; the mass of global tokens [batch, heads, rows]; and peaks [batch, heads,
    query_length] if asked for.
    """
    tiles = tl.cdiv(sizes.num_rows, tile.rows)
    own, tile_number = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    pair = own + sizes.first_pair
    end = _end_of(inputs, sizes, pair // sizes.heads, tile)
    query, index, row, is_there, vote = _load_queries(inputs, sizes, pair, tile_number, tile)
    first_row = tile_number * tile.rows
    places_of = _places_of(inputs, sizes, pair, first_row, end, tile)
    num_used = _num_used(sizes, first_row + tile.rows - 1, places_of[1], end, tile)

    peak = _log_rest(inputs, sizes, pair, index, places_of[1], vote)
    total = tl.where(peak == float("-inf"), 0.0, 1.0)
    if inputs.global_positions is not None:
        for first in range(0, sizes.num_global, 16):
            scores = _global_scores(inputs, sizes, pair, query, row, first, tile)
            peak, total = _add(peak, total, scores)
    for first in range(0, num_used, tile.blocks):
        scores = _scores(inputs, sizes, weights, pair, query, row, places_of, first, tile)
        peak, total = _add(peak, total, scores)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    if peaks is not None:
        start = peaks + pair.to(tl.int64) * sizes.query_length
        tl.store(start + index, peak, mask=is_there)
    factor = (vote / tl.maximum(total, 1.1754944e-38))[:, None]

    row_slot = tl.arange(0, tile.row_slots)
    row = first_row + row_slot
    is_row = (row_slot < tile.rows) & (row < sizes.num_rows)
    at = pair.to(tl.int64) * sizes.num_rows + row
    covered = tl.full((tile.row_slots,), 0.0, tl.float32)  # tl.zeros takes no tile of Triton 3.6
    query_row = first_row + tl.arange(0, tile.queries) // tile.query_slots
    if inputs.global_positions is not None:
        for first in range(0, sizes.num_global, 16):
            scores = _global_scores(inputs, sizes, pair, query, query_row, first, tile)
            shares = tl.exp2(scores - peak[:, None]) * factor
            covered += tl.sum(_sum_of_rows(shares, tile), axis=1)
    tl.store(of_globals + at, covered, mask=is_row)
    at = own.to(tl.int64) * sizes.num_rows + row
    for first in range(0, num_used, tile.blocks):
        scores = _scores(inputs, sizes, weights, pair, query, query_row, places_of, first, tile)
        share = _sum_of_rows(_block_sums(scores, peak, tile) * factor, tile)
        candidate = first + tl.arange(0, tile.blocks)
        tl.store(
            masses + at[:, None] * sizes.num_candidates + candidate[None, :],
            share,
            mask=is_row[:, None] & (candidate < sizes.num_candidates)[None, :],
        )


@triton.jit
def _chances(seed, head, row, block):
    """Of `sampling.py`."""
    word = mix(mix(head.to(tl.uint32) ^ mix(tl.cast(seed, tl.uint32))) ^ row.to(tl.uint32))
    drawn = (mix(word ^ mix(block.to(tl.uint32))) >> 8) + 1
    return drawn.to(tl.float32) * 5.9604644775390625e-08


@triton.jit(do_not_specialize=["sizes"])
def best_kernel(
    inputs, sizes, masses, result, marks: tl.constexpr, tile: tl.constexpr, slots: tl.constexpr
):
    """Writes the first four tensors of an `ExactChoice`, for a query block, and where blocks are
    drawn its threshold. With `marks` masses become -1 for what it reads, and 0 for what it drops.
    """
    key_blocks, counts, mass, covered, threshold = result
    own, row = tl.program_id(0).to(tl.int64), tl.program_id(0) % sizes.num_rows
    pair = tl.program_id(0) // sizes.num_rows + sizes.first_pair
    at = pair.to(tl.int64) * sizes.num_rows + row
    end = _end_of(inputs, sizes, pair // sizes.heads, tile)
    places_of = _places_of(inputs, sizes, pair, row, end, tile)
    candidate = tl.arange(0, slots)
    block = _blocks_of(inputs, sizes, places_of, candidate, tile)
    is_there = candidate < _num_used(sizes, row, places_of[1], end, tile)
    is_there = is_there & (block < sizes.num_key_blocks)
    masses += own * sizes.num_candidates
    share = tl.load(masses + candidate, mask=is_there, other=0.0)
    first, last = _covered_range(sizes, row, end, tile)
    is_covered = (block >= first) & (block <= last)
    if inputs.shared_blocks is not None:
        for number in range(sizes.num_shared):
            shared = inputs.shared_blocks + pair.to(tl.int64) * sizes.num_shared + number
            is_covered = is_covered | (block == tl.load(shared))
    of_globals = tl.load(covered + at)
    tl.store(covered + at, of_globals + tl.sum(tl.where(is_covered, share, 0.0), axis=0))

    if inputs.place_weights is not None:
        place = candidate // tile.blocks_per_place
        is_place = place < places_of[1]
        weights = inputs.place_weights + places_of[0] * sizes.num_places
        share *= tl.load(weights + place, mask=is_place, other=1.0)
    # Masses above 0 are ordered as their bits are; of equal ones the first block is the largest.
    is_open = is_there & ~is_covered & (share > 0)
    number_of_row = row + sizes.first_row
    if threshold is not None:
        share /= _chances(sizes.sampling_seed, pair % sizes.heads, number_of_row, block)
    bits = share.to(tl.int32, bitcast=True).to(tl.int64) << 32
    rank = tl.where(is_open, bits | (0x7FFFFFFF - block).to(tl.int64), 0)
    count = 0
    for place in range(sizes.num_blocks):
        best = tl.max(rank, axis=0)
        rank = tl.where(rank == best, 0, rank)
        is_chosen = best > 0
        number = 0x7FFFFFFF - (best & 0xFFFFFFFF).to(tl.int32)
        tl.store(key_blocks + at * sizes.num_blocks + place, tl.where(is_chosen, number, 0))
        of_best = (best >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        if threshold is not None:
            of_best *= _chances(sizes.sampling_seed, pair % sizes.heads, number_of_row, number)
        tl.store(mass + at * sizes.num_blocks + place, of_best)
        count += is_chosen.to(tl.int32)
    tl.store(counts + at, count)
    if threshold is not None:
        of_next = (tl.max(rank, axis=0) >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        tl.store(threshold + at, of_next)
    if marks:
        is_read = is_covered | (is_open & (rank == 0))
        is_slot = candidate < sizes.num_candidates
        tl.store(masses + candidate, tl.where(is_read, -1.0, 0.0), mask=is_slot)


@triton.jit(do_not_specialize=["sizes"])
def dropped_kernel(inputs, sizes, weights, marks, log_dropped, tile: tl.constexpr):
    """Writes log_dropped, where the peaks are."""
    tiles = tl.cdiv(sizes.num_rows + tile.is_causal, tile.rows)
    own, tile_number = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    pair = own + sizes.first_pair
    end = _end_of(inputs, sizes, pair // sizes.heads, tile)
    query, index, row, is_there, vote = _load_queries(inputs, sizes, pair, tile_number, tile)
    first_row = tile_number * tile.rows
    places_of = _places_of(inputs, sizes, pair, first_row, end, tile)
    num_used = _num_used(sizes, first_row + tile.rows - 1, places_of[1], end, tile)
    log_dropped += pair.to(tl.int64) * sizes.query_length
    peak = tl.load(log_dropped + index, mask=vote > 0, other=0.0)
    dropped = tl.exp2(_log_rest(inputs, sizes, pair, index, places_of[1], vote) - peak)
    at = own.to(tl.int64) * sizes.num_rows + row
    for first in range(0, num_used, tile.blocks):
        scores = _scores(inputs, sizes, weights, pair, query, row, places_of, first, tile)
        candidate = first + tl.arange(0, tile.blocks)
        mark = tl.load(
            marks + at[:, None] * sizes.num_candidates + candidate[None, :],
            mask=(vote > 0)[:, None] & (candidate < sizes.num_candidates)[None, :],
            other=-1.0,
        )
        sums = tl.where(mark < 0, 0.0, _block_sums(scores, peak, tile))
        dropped += tl.sum(sums, axis=1)
    is_left = (vote > 0) & (dropped > 0)
    logarithm = (tl.log2(tl.where(is_left, dropped, 1.0)) + peak) / _LOG2E
    tl.store(log_dropped + index, tl.where(is_left, logarithm, float("-inf")), mask=is_there)
