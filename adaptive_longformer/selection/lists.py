"""The lists of key blocks that the attention reads: of the window, and the chosen ones."""

import torch

from adaptive_longformer.attention.kernels.triton_device import FAR, why_no_triton
from adaptive_longformer.patterns.block_layout import (
    BlockLayout,
    EntryFlag,
    known_right,
    most_window_entries,
    window_entries,
)
from adaptive_longformer.patterns.sliding_window import SlidingWindow
from adaptive_longformer.selection.options import SelectionOptions
from adaptive_longformer.selection.select_blocks import SelectedBlocks

_SELECTED, _FULL = int(EntryFlag.SELECTED), int(EntryFlag.FULL)
Lists = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def selection_layout(
    selected: SelectedBlocks,
    window: SlidingWindow,
    length: int,
    options: SelectionOptions,
    rank_limit: torch.Tensor | None = None,
    reach: torch.Tensor | None = None,
) -> tuple[BlockLayout, torch.Tensor]:
    """The layout of the window and the chosen blocks.

    Args:
        selected: the result of `select_blocks`.
        window: the window it was called with.
        length: tokens per row.
        options: the options it was called with.
        rank_limit: int [heads], entries beyond this rank leave the list; None: none do.
        reach: int64 [heads], window entries whose keys are all further from the queries leave the
            list; None: none do.

    Returns:
        The layout, its lists the window's entries, then the chosen blocks best first, then the
        blocks chosen for the whole row; and slots, int64 in the shape of its key_blocks: which
        chosen block an entry is, 1 for the best, after num_blocks those of the whole row, 0 for the
        window and the filling.
    """
    query_size, key_size = options.query_block_size, options.block_size
    if why_no_triton(selected.key_blocks.device) is None:
        assert window.right is not None
        width = most_window_entries(window, length, query_size, key_size)
        sides = [min(side, FAR) for side in (window.left, window.right)]
        key_blocks, counts, flags, slots = lists_operator(
            selected.key_blocks, selected.counts, selected.global_blocks, selected.global_open,
            rank_limit, reach, [*sides, length, query_size, key_size, width],
        )  # fmt: skip
    else:
        key_blocks, counts, flags, slots = _torch_lists(
            selected, window, length, options, rank_limit, reach
        )
    layout = BlockLayout(
        key_blocks=key_blocks,
        counts=counts,
        flags=flags,
        query_block_size=query_size,
        key_block_size=key_size,
        length=length,
        window=window,
    )
    return known_right(layout), slots


def weights_of_entries(selected: SelectedBlocks, slots: torch.Tensor) -> torch.Tensor | None:
    """What is added to the scores of a layout's entries, as they stand for blocks that are not
    read, by the slots of `selection_layout`; None where blocks are not drawn by chance.
    """
    if selected.log_weights is None:
        return None
    filler = (1, selected.global_blocks.shape[-1])
    return torch.nn.functional.pad(selected.log_weights, filler).gather(-1, slots)


@torch.library.custom_op("adaptive_longformer::selection_lists", mutates_args=())
def lists_operator(
    key_blocks: torch.Tensor,
    counts: torch.Tensor,
    global_blocks: torch.Tensor,
    global_open: torch.Tensor,
    rank_limit: torch.Tensor | None,
    reach: torch.Tensor | None,
    sizes: list[int],
) -> Lists:
    """The lists in Triton, whose inside torch.compile need not see; see `triton_lists`."""
    from adaptive_longformer.selection.triton_lists import triton_lists

    results = _empty_lists(key_blocks, counts, global_blocks, sizes)
    triton_lists(
        key_blocks.contiguous(), counts.contiguous(), global_blocks.contiguous(),
        global_open.contiguous(), rank_limit, reach, tuple(sizes), results,
    )  # fmt: skip
    return results


@lists_operator.register_fake
def _(key_blocks, counts, global_blocks, global_open, rank_limit, reach, sizes):
    return _empty_lists(key_blocks, counts, global_blocks, sizes)


def _empty_lists(
    key_blocks: torch.Tensor, counts: torch.Tensor, global_blocks: torch.Tensor, sizes: list[int]
) -> Lists:
    shape = (*counts.shape, sizes[-1] + key_blocks.shape[-1] + global_blocks.shape[-1])
    return (
        key_blocks.new_empty(shape),
        torch.empty_like(counts, memory_format=torch.contiguous_format),
        key_blocks.new_empty(shape),
        key_blocks.new_empty(shape, dtype=torch.int64),
    )


def _torch_lists(
    selected: SelectedBlocks,
    window: SlidingWindow,
    length: int,
    options: SelectionOptions,
    rank_limit: torch.Tensor | None,
    reach: torch.Tensor | None,
) -> Lists:
    """Key blocks, counts, flags and slots, on any device."""
    device = selected.key_blocks.device
    query_size, key_size = options.query_block_size, options.block_size
    rank = torch.arange(selected.key_blocks.shape[-1], device=device)
    far, far_counts, far_slots = selected.key_blocks, selected.counts, rank + 1
    if rank_limit is not None:
        far_counts = torch.minimum(far_counts, rank_limit[:, None].to(far_counts.dtype))
    if selected.global_blocks.shape[-1]:
        shared = selected.global_blocks[:, :, None].expand(-1, -1, far.shape[2], -1)
        used = torch.cat([rank < far_counts[..., None], selected.global_open], dim=-1)
        order = torch.argsort(used.int(), dim=-1, descending=True, stable=True)
        far, far_slots = torch.cat([far, shared], dim=-1).gather(-1, order), order + 1
        far_counts = used.sum(dim=-1, dtype=torch.int32)

    near, near_flags = window_entries(window, length, query_size, key_size, device, reach)
    is_near, width = near_flags != 0, near.shape[-1]
    near_counts = is_near.sum(dim=-1, keepdim=True)
    # Chosen blocks differ by head: what is done for each of them is done in int32.
    assert window.right is not None
    left, right = min(window.left, length), min(window.right, length)
    start = torch.arange(far.shape[2], device=device)[:, None] * query_size
    before, behind = (start - left) // key_size, -(-(start + query_size + right) // key_size)
    is_outside = (far < before.int()) | (far >= behind.int())
    position = torch.arange(far.shape[-1], device=device)
    is_far, index = position < far_counts[..., None], (near_counts + position).expand(far.shape)

    def joined(of_near: torch.Tensor, of_far: torch.Tensor) -> torch.Tensor:
        lists = of_far.new_zeros(*far.shape[:3], width + far.shape[-1])
        lists[..., :width] = of_near
        return lists.scatter_(-1, index, of_far * is_far)

    return (
        joined(near * is_near, far),
        (near_counts[..., 0] + far_counts).int(),
        joined(near_flags, _SELECTED + is_outside.int() * _FULL),
        joined(torch.zeros_like(near), far_slots),
    )
