"""The selection's first control: as many blocks, chosen at random. For study only."""

import torch

from adaptive_longformer.baselines.candidate_blocks import best_blocks, candidate_blocks
from adaptive_longformer.patterns.mixing import mix
from adaptive_longformer.patterns.sliding_window import SlidingWindow
from adaptive_longformer.selection.options import SelectionOptions
from adaptive_longformer.selection.select_blocks import SelectedBlocks


@torch.no_grad()
def random_selection(
    query: torch.Tensor,
    window: SlidingWindow,
    options: SelectionOptions,
    *,
    attention_mask: torch.Tensor | None = None,
    global_mask: torch.Tensor | None = None,
    seed: int = 0,
) -> SelectedBlocks:
    """As many blocks as `select_blocks` may choose, drawn by a hash from the blocks it may choose
    from; the arguments are its own.

    Args:
        seed: of the draw, which also depends on head, query block and key block, and on nothing
            else: the same in training and evaluation.
    """
    candidates = candidate_blocks(query, window, options, attention_mask, global_mask)
    batch, heads, rows, columns = candidates.shape
    head = mix(torch.arange(heads, device=query.device) + (seed << 16))[:, None, None]
    row = mix(torch.arange(rows, device=query.device) + 0x2545F491)[:, None]
    column = mix(torch.arange(columns, device=query.device) + 0x5BD1E995)
    score = 1.0 + mix(head ^ mix(row ^ column)).to(torch.float32)
    return best_blocks(score.expand(batch, -1, -1, -1), candidates, query, options)
