"""The selection's second control: the blocks with the most exact attention. It takes the time and
memory of dense attention: for study only.
"""

import torch

from adaptive_longformer.attention.padding import ordinary_tokens
from adaptive_longformer.baselines.candidate_blocks import (
    best_blocks,
    candidate_blocks,
)
from adaptive_longformer.patterns.sliding_window import SlidingWindow
from adaptive_longformer.selection.means import sum_runs
from adaptive_longformer.selection.options import SelectionOptions
from adaptive_longformer.selection.select_blocks import SelectedBlocks


@torch.no_grad()
def oracle_selection(
    query: torch.Tensor,
    key: torch.Tensor,
    window: SlidingWindow,
    options: SelectionOptions,
    *,
    attention_mask: torch.Tensor | None = None,
    global_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> SelectedBlocks:
    """The blocks with the largest share of the full attention of their query block; the arguments
    are those of `select_blocks`.
    """
    factor = query.shape[3] ** -0.5 if scale is None else scale
    candidates = candidate_blocks(query, window, options, attention_mask, global_mask)
    scores = query.float() @ key.float().transpose(-1, -2) * factor
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask[:, None, None, :], -torch.inf)
    weights = scores.softmax(dim=-1).nan_to_num(0.0)
    if global_mask is not None:
        # Global tokens neither vote nor are chosen.
        weights = weights.masked_fill(global_mask[:, None, None, :], 0.0)
    votes = ordinary_tokens(attention_mask, global_mask)
    if votes is not None:
        weights = weights * votes[:, None, :, None]
    mass = sum_runs(sum_runs(weights, 2, options.query_block_size), 3, options.block_size)
    return best_blocks(mass / options.query_block_size, candidates, query, options)
