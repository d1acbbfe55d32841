"""The exact stage of the selection in Triton: no score is ever in memory, and no number is read
back from the device.

Kernels, each over all rows of a batch and all heads at once, or a group of them:

- weights: the log2 of what every key counts, -inf for those of a block with a bad one;
- masses: a tile of query blocks, of one where it has places, meets its candidates twice, first for
  the peak and the sum of every query, then for the mass of every block: float32 [heads of the
  group, query_blocks, candidates], which is all that is written;
- best: the blocks with the largest masses, one at a time, with a row of masses in registers;
- dropped: for a finer stage, what each query leaves behind.
"""

from typing import Any, NamedTuple

import torch

from adaptive_longformer.attention.kernels.triton_device import FAR
from adaptive_longformer.selection.exact_call import ExactCall, ExactChoice
from adaptive_longformer.selection.triton_kernels import (
    best_kernel,
    dropped_kernel,
    masses_kernel,
    weights_kernel,
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Queries of a tile where blocks do not ask for others, and keys.
_TILE = 64
# Masses of a query block in registers, at most.
_MOST_CANDIDATES = 16384


class _Inputs(NamedTuple):
    """Tensors, in the words of `ExactCall`, and the strides of those that may be views."""

    query: torch.Tensor
    key: torch.Tensor
    key_counts: torch.Tensor | None
    voters: torch.Tensor | None
    ends: torch.Tensor | None
    global_positions: torch.Tensor | None
    global_keys: torch.Tensor | None
    shared_blocks: torch.Tensor | None
    places: torch.Tensor | None
    place_counts: torch.Tensor | None
    log_rest: torch.Tensor | None
    place_weights: torch.Tensor | None
    query_batch: int
    query_head: int
    query_token: int
    key_batch: int
    key_head: int
    key_token: int
    counts_batch: int
    voters_batch: int
    positions_batch: int
    global_keys_batch: int


class _Sizes(NamedTuple):
    """Numbers that change from call to call without a new kernel."""

    scale: float
    heads: int
    heads_per_key_head: int
    query_length: int
    length: int
    first_row: int
    num_rows: int
    num_keys: int
    num_key_blocks: int
    num_global: int
    num_shared: int
    num_places: int
    num_candidates: int
    num_placed: int
    num_blocks: int
    left: int
    right: int
    sampling_seed: int
    first_pair: int


class _Tile(NamedTuple):
    """What a kernel is compiled for. Sizes of its arrays are powers of 2, blocks fill them in part.

    Attributes:
        rows, row_slots: query blocks of a tile, and room for them.
        query_slots, key_slots: room for the queries and keys of a block.
        blocks: key blocks of a tile.
        queries, keys: room for those of all blocks.
    """

    rows: int
    row_slots: int
    query_block_size: int
    query_slots: int
    blocks: int
    block_size: int
    keys_per_block: int
    key_slots: int
    head_dim: int
    dim_slots: int
    is_causal: bool
    blocks_per_place: int
    queries: int
    keys: int


def _power_of_2(number: int) -> int:
    """The least one that is not smaller. Triton's own is of the type constexpr for pyright."""
    return 1 << (number - 1).bit_length()


def can_choose(call: ExactCall) -> bool:
    """Whether `triton_choice` may take a call, wherever its tensors are."""
    return (
        call.query.dtype in _DTYPES
        and call.key.dtype == call.query.dtype
        and call.num_candidates <= _MOST_CANDIDATES
    )


def triton_choice(
    call: ExactCall, with_dropped: bool = False, most_masses: int = 2**26
) -> ExactChoice:
    """The choice.

    Args:
        call: one that `can_choose` takes.
        with_dropped: whether to return `log_dropped`.
        most_masses: in memory at a time, where those of one head are no more.
    """
    query, key = (t if t.stride(-1) == 1 else t.contiguous() for t in (call.query, call.key))
    batch, heads, query_length, _ = query.shape
    new, rows = query.new_empty, call.num_rows
    floats, width = torch.float32, call.num_candidates
    result = ExactChoice(
        key_blocks=new(batch, heads, rows, call.num_blocks, dtype=torch.int32),
        counts=new(batch, heads, rows, dtype=torch.int32),
        mass=new(batch, heads, rows, call.num_blocks, dtype=floats),
        covered=new(batch, heads, rows, dtype=floats),
        share=new(batch, heads, rows, 0, dtype=floats),
        log_dropped=new(batch, heads, query_length if with_dropped else 0, dtype=floats),
        threshold=new(batch, heads, call.num_drawn_rows, dtype=floats),
        log_weights=new(batch, heads, 0, call.num_blocks, dtype=floats),
    )
    inputs, sizes, tile = _inputs(call, query, key), _sizes(call), _tile(call)
    weights = new(*key.shape[:2], call.num_sequence_keys, dtype=floats)
    pairs, tiles = batch * heads, -(-rows // tile.rows)
    group = max(min(pairs, most_masses // max(rows * width, 1)), 1)
    masses = new(group, rows, width, dtype=floats)
    dropped = result.log_dropped if with_dropped else None
    threshold = result.threshold if call.num_drawn_rows else None
    key_tiles = -(-call.num_key_blocks // tile.blocks)
    # Queries of the last block vote for none that there is.
    voting_tiles = -(-(rows + call.is_causal) // tile.rows)
    warps, slots = min(max(tile.queries // 16, 2), 8), max(_power_of_2(width), 32)
    with torch.cuda.device_of(query):
        _launch(weights_kernel, batch * key.shape[1] * key_tiles, 4, inputs, sizes, weights, tile)
        for first in range(0, pairs, group):
            sizes, count = sizes._replace(first_pair=first), min(group, pairs - first)
            _launch(
                masses_kernel, count * tiles, warps,
                inputs, sizes, weights, masses, result.covered, dropped, tile,
            )  # fmt: skip
            _launch(
                best_kernel, count * rows, max(slots // 1024, 1),
                inputs, sizes, masses, (*result[:4], threshold), with_dropped, tile, slots,
            )  # fmt: skip
            if with_dropped:
                _launch(
                    dropped_kernel, count * voting_tiles, warps,
                    inputs, sizes, weights, masses, dropped, tile,
                )  # fmt: skip
    return result


def _launch(kernel: Any, num_programs: int, num_warps: int, *arguments: Any) -> None:
    if num_programs:
        kernel[num_programs,](*arguments, num_warps=num_warps)


def _inputs(call: ExactCall, query: torch.Tensor, key: torch.Tensor) -> _Inputs:
    places = call.places
    counts, voters = _rows(call.key_counts), _rows(call.voters)
    positions = _rows(call.global_positions)
    global_keys = positions if call.global_keys is None else _rows(call.global_keys)
    return _Inputs(
        query=query,
        key=key,
        key_counts=counts,
        voters=voters,
        ends=call.ends,
        global_positions=positions,
        global_keys=global_keys,
        shared_blocks=None if call.shared_blocks is None else call.shared_blocks.contiguous(),
        places=None if places is None else places.numbers.contiguous(),
        place_counts=None if places is None else places.counts.contiguous(),
        log_rest=None if places is None else places.log_rest.contiguous(),
        place_weights=None if places is None else _rows(places.weights),
        query_batch=query.stride(0),
        query_head=query.stride(1),
        query_token=query.stride(2),
        key_batch=key.stride(0),
        key_head=key.stride(1),
        key_token=key.stride(2),
        counts_batch=0 if counts is None else counts.stride(0),
        voters_batch=0 if voters is None else voters.stride(0),
        positions_batch=0 if positions is None else positions.stride(0),
        global_keys_batch=0 if global_keys is None else global_keys.stride(0),
    )


def _rows(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """With rows in one piece each; the same one may stand for all."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _sizes(call: ExactCall) -> _Sizes:
    places, positions = call.places, call.global_positions
    return _Sizes(
        scale=call.scale,
        heads=call.query.shape[1],
        heads_per_key_head=call.query.shape[1] // call.key.shape[1],
        query_length=call.query.shape[2],
        length=call.length,
        first_row=call.first_row,
        num_rows=call.num_rows,
        num_keys=call.num_sequence_keys,
        num_key_blocks=call.num_key_blocks,
        num_global=0 if positions is None else positions.shape[1],
        num_shared=0 if call.shared_blocks is None else call.shared_blocks.shape[2],
        num_places=0 if places is None else places.numbers.shape[3],
        num_candidates=call.num_candidates,
        num_placed=call.num_placed,
        num_blocks=call.num_blocks,
        left=min(call.left, FAR),
        right=min(call.right, FAR),
        sampling_seed=call.sampling_seed,
        first_pair=0,
    )


def _tile(call: ExactCall) -> _Tile:
    size, keys_per_block = call.query_block_size, call.keys_per_block
    query_slots = _power_of_2(size)
    key_slots = _power_of_2(keys_per_block)
    rows = max(_TILE // query_slots, 1) if call.places is None else 1
    # A product of matrices has 16 rows and columns at least.
    row_slots = max(_power_of_2(rows), 16 // query_slots)
    queries, head_dim = row_slots * query_slots, call.query.shape[3]
    blocks = max(_TILE // key_slots, 1)
    return _Tile(
        rows=rows,
        row_slots=row_slots,
        query_block_size=size,
        query_slots=query_slots,
        blocks=blocks,
        block_size=call.block_size,
        keys_per_block=keys_per_block,
        key_slots=key_slots,
        head_dim=head_dim,
        dim_slots=max(_power_of_2(head_dim), 16),
        is_causal=call.is_causal,
        blocks_per_place=1 if call.places is None else call.places.blocks_per_place,
        queries=queries,
        keys=blocks * key_slots,
    )
