"""What the controls of the selection may choose from, and the best of it.

All pairs of blocks at once: for study only.
"""

import torch

from adaptive_longformer.attention.padding import ordinary_tokens
from adaptive_longformer.patterns.sliding_window import SlidingWindow
from adaptive_longformer.selection.means import sum_runs
from adaptive_longformer.selection.options import SelectionOptions
from adaptive_longformer.selection.select_blocks import SelectedBlocks


def candidate_blocks(
    query: torch.Tensor,
    window: SlidingWindow,
    options: SelectionOptions,
    attention_mask: torch.Tensor | None,
    global_mask: torch.Tensor | None,
) -> torch.Tensor:
    """Which key blocks a query block may choose: bool [batch, heads, query_blocks, key_blocks]."""
    batch, heads, length, _ = query.shape
    ordinary = ordinary_tokens(attention_mask, global_mask)
    if ordinary is None:
        ordinary = torch.ones(batch, length, dtype=torch.bool, device=query.device)
    slot = torch.arange(1, length + 1, device=query.device)
    valid = slot if attention_mask is None else slot * attention_mask
    last = valid.amax(dim=-1).view(-1, 1, 1) - 1  # of each row's real tokens
    assert window.right is not None

    def ends(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        start = torch.arange(0, length, size, device=query.device)
        return start, torch.minimum(start + size - 1, last)

    first_query, last_query = ends(options.query_block_size)
    first_key, last_key = ends(options.block_size)
    covered = (first_key >= last_query.transpose(1, 2) - window.left) & (
        last_key <= first_query[:, None] + window.right
    )
    has_tokens = sum_runs(ordinary.int(), 1, options.block_size) > 0
    candidates = ~covered & has_tokens[:, None, :]
    return candidates[:, None].expand(batch, heads, -1, -1)


def best_blocks(
    score: torch.Tensor, candidates: torch.Tensor, query: torch.Tensor, options: SelectionOptions
) -> SelectedBlocks:
    """The candidates with the largest positive scores."""
    score = score.masked_fill(~candidates, 0.0)
    width = options.num_blocks - score.shape[-1]
    if width > 0:
        score = torch.nn.functional.pad(score, (0, width))
    mass, blocks = score.topk(options.num_blocks, dim=-1)
    counts = (mass > 0).sum(dim=-1, dtype=torch.int32)
    batch, heads, rows, _ = blocks.shape
    nothing = query.new_zeros(batch, heads, 0)
    return SelectedBlocks(
        key_blocks=blocks.where(mass > 0, 0).int(),
        counts=counts,
        mass=mass,
        covered=torch.zeros(batch, heads, rows, device=query.device),
        global_blocks=nothing.int(),
        global_open=torch.zeros(batch, heads, rows, 0, dtype=torch.bool, device=query.device),
        global_means=query.new_zeros(batch, heads, 0, query.shape[3]),
    )
