"""What the adaptive selection is compared with: blocks chosen at random, and by an oracle.

Both take the time and memory of dense attention or of all pairs of blocks: for study only.
"""

import torch

from adaptive_longformer.patterns.mixing import mix
from adaptive_longformer.patterns.sliding_window import SlidingWindow
from adaptive_longformer.selection.select_blocks import RoutingOptions, SelectedBlocks


@torch.no_grad()
def random_selection(
    query: torch.Tensor,
    window: SlidingWindow,
    options: RoutingOptions,
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
    candidates = _candidates(query, window, options, attention_mask, global_mask)
    batch, heads, rows, columns = candidates.shape
    head = mix(torch.arange(heads, device=query.device) + (seed << 16))[:, None, None]
    row = mix(torch.arange(rows, device=query.device) + 0x2545F491)[:, None]
    column = mix(torch.arange(columns, device=query.device) + 0x5BD1E995)
    score = 1.0 + mix(head ^ mix(row ^ column)).to(torch.float32)
    return _best(score.expand(batch, -1, -1, -1), candidates, query, options)


@torch.no_grad()
def oracle_selection(
    query: torch.Tensor,
    key: torch.Tensor,
    window: SlidingWindow,
    options: RoutingOptions,
    *,
    attention_mask: torch.Tensor | None = None,
    global_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> SelectedBlocks:
    """The blocks with the largest share of the full attention of their query block; the arguments
    are those of `select_blocks`.
    """
    factor = query.shape[3] ** -0.5 if scale is None else scale
    candidates = _candidates(query, window, options, attention_mask, global_mask)
    length = query.shape[2]
    scores = query.float() @ key.float().transpose(-1, -2) * factor
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask[:, None, None, :], -torch.inf)
    weights = scores.softmax(dim=-1).nan_to_num(0.0)
    votes = torch.ones(query.shape[0], length, dtype=torch.bool, device=query.device)
    if attention_mask is not None:
        votes = votes & attention_mask
    if global_mask is not None:
        # Global tokens neither vote nor are chosen.
        votes = votes & ~global_mask
        weights = weights.masked_fill(global_mask[:, None, None, :], 0.0)
    weights = weights * votes[:, None, :, None]
    mass = _sum_blocks(_sum_blocks(weights, 2, options.query_block_size), 3, options.block_size)
    return _best(mass / options.query_block_size, candidates, query, options)


def _candidates(
    query: torch.Tensor,
    window: SlidingWindow,
    options: RoutingOptions,
    attention_mask: torch.Tensor | None,
    global_mask: torch.Tensor | None,
) -> torch.Tensor:
    """Which key blocks a query block may choose: bool [batch, heads, query_blocks, key_blocks]."""
    batch, heads, length, _ = query.shape
    ordinary = torch.ones(batch, length, dtype=torch.bool, device=query.device)
    if attention_mask is not None:
        ordinary = ordinary & attention_mask
    if global_mask is not None:
        ordinary = ordinary & ~global_mask
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
    has_tokens = _sum_blocks(ordinary.int(), 1, options.block_size) > 0
    candidates = ~covered & has_tokens[:, None, :]
    return candidates[:, None].expand(batch, heads, -1, -1)


def _best(
    score: torch.Tensor, candidates: torch.Tensor, query: torch.Tensor, options: RoutingOptions
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


def _sum_blocks(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """Sums over consecutive runs of `size` along a dimension; the last run may be shorter."""
    filler = -tensor.shape[dim] % size
    padding = [0, 0] * (tensor.ndim - 1 - dim) + [0, filler]
    return torch.nn.functional.pad(tensor, padding).unflatten(dim, (-1, size)).sum(dim=dim + 1)
