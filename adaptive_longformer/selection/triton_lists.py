# type: ignore  (a kernel's types are Triton's)
"""The lists of `lists.py` in one kernel: a program for every query block of every head."""

import torch
import triton
import triton.language as tl

from adaptive_longformer.patterns.block_layout import EntryFlag

_FULL = tl.constexpr(int(EntryFlag.FULL))
_WINDOW = tl.constexpr(int(EntryFlag.WINDOW))
_SELECTED = tl.constexpr(int(EntryFlag.SELECTED))


def triton_lists(
    key_blocks: torch.Tensor,
    counts: torch.Tensor,
    global_blocks: torch.Tensor,
    global_open: torch.Tensor,
    rank_limit: torch.Tensor | None,
    reach: torch.Tensor | None,
    sizes: tuple[int, ...],
    results: tuple[torch.Tensor, ...],
) -> None:
    """Writes the lists.

    Args:
        key_blocks, counts, global_blocks, global_open: as in `SelectedBlocks`, contiguous.
        rank_limit, reach: as in `selection_layout`.
        sizes: window to the left and right, length, tokens per query block and per key block, and
            entries of the window, at most.
        results: key blocks, counts, flags and slots as `selection_layout` returns them.
    """
    _, heads, rows, num_ranked = key_blocks.shape
    entries = results[0].shape[-1]
    numbers = (heads, rows, num_ranked, global_blocks.shape[-1], entries)
    slots = max(triton.next_power_of_2(entries), 32)
    if counts.numel():
        with torch.cuda.device_of(counts):
            _lists_kernel[counts.numel(),](
                key_blocks, counts, global_blocks, global_open, rank_limit, reach, sizes, numbers,
                results, slots, num_warps=max(min(slots // 256, 8), 1),
            )  # fmt: skip


@triton.jit(do_not_specialize=["sizes", "numbers"])
def _lists_kernel(
    key_blocks, counts, global_blocks, global_open, rank_limit, reach, sizes, numbers, results,
    slots: tl.constexpr,
):  # fmt: skip
    left, right, length, query_size, key_size, width = sizes
    heads, rows, num_ranked, num_shared, num_entries = numbers
    out_blocks, out_counts, out_flags, out_slots = results
    at = tl.program_id(0).to(tl.int64)
    pair, row = at // rows, (at % rows).to(tl.int32)
    entry = tl.arange(0, slots)

    start = row * query_size
    end = tl.minimum(start + query_size, length) - 1
    near_left, near_right = left, right
    if reach is not None:
        limit = tl.load(reach + pair % heads)
        near_left = tl.minimum(limit, left).to(tl.int32)
        near_right = tl.minimum(limit, right).to(tl.int32)
    first = tl.maximum(start - near_left, 0) // key_size
    last = tl.minimum(end + near_right, length - 1) // key_size
    near_count = tl.maximum(tl.minimum(last - first + 1, width), 0)
    block, slot = first + entry, entry * 0

    far_count = tl.load(counts + at)
    if rank_limit is not None:
        far_count = tl.minimum(far_count, tl.load(rank_limit + pair % heads).to(tl.int32))
    rank = entry - near_count
    is_ranked = (rank >= 0) & (rank < far_count)
    ranked = tl.load(key_blocks + at * num_ranked + rank, mask=is_ranked, other=0)
    block, slot = tl.where(is_ranked, ranked, block), tl.where(is_ranked, 1 + rank, slot)
    count = near_count + far_count
    for number in range(num_shared):
        is_next = entry == count
        is_open = tl.load(global_open + at * num_shared + number) != 0
        shared = tl.load(global_blocks + pair * num_shared + number)
        block = tl.where(is_next, shared, block)
        slot = tl.where(is_next, 1 + num_ranked + number, slot)
        count += is_open.to(tl.int32)

    key_start = block * key_size
    key_end = tl.minimum(key_start + key_size, length) - 1
    is_full = (key_start >= end - left) & (key_end <= start + right)
    near_flags = tl.where(is_full, _WINDOW | _FULL, _WINDOW)
    is_outside = (key_start + key_size - 1 < start - left) | (
        key_start > start + query_size - 1 + right
    )
    far_flags = tl.where(is_outside, _SELECTED | _FULL, _SELECTED)
    flags = tl.where(entry < near_count, near_flags, far_flags)
    is_used, is_entry = entry < count, entry < num_entries
    place = at * num_entries + entry
    tl.store(out_blocks + place, tl.where(is_used, block, 0), mask=is_entry)
    tl.store(out_flags + place, tl.where(is_used, flags, 0), mask=is_entry)
    tl.store(out_slots + place, tl.where(is_used, slot, 0), mask=is_entry)
    tl.store(out_counts + at, count)
