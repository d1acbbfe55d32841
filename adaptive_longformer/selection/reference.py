"""The definition of the adaptive selection: one query block at a time, all blocks compared.

`select_blocks` equals this file where a row has at most `start_nodes` blocks.
"""

import torch

from adaptive_longformer.patterns.sliding_window import SlidingWindow
from adaptive_longformer.selection.options import SelectionOptions
from adaptive_longformer.selection.pyramid import FAN_OUT


def reference_votes(
    query: torch.Tensor,
    key: torch.Tensor,
    row: int,
    window: SlidingWindow,
    options: SelectionOptions,
    *,
    valid: torch.Tensor | None = None,
    is_global: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[dict[int, float], float]:
    """The soft mass of every block that a query block may choose, and of what it reads anyway.

    Args:
        query, key: [length, head_dim], one head of one sequence.
        row: number of the query block.
        window, options: as in `select_blocks`.
        valid, is_global: bool [length], tokens that are not padding, and global tokens.
        is_causal, scale: as in `select_blocks`.
    """
    length, head_dim = query.shape
    scale = float(head_dim**-0.5 if scale is None else scale)
    nothing = torch.zeros(length, dtype=torch.bool)
    is_global = nothing if is_global is None else is_global
    valid = ~nothing if valid is None else valid
    ordinary = valid & ~is_global
    if not is_causal and valid.any():
        length = int(valid.nonzero().max()) + 1

    start = row * options.query_block_size
    first_query, last_query = start, start + options.query_block_size - 1
    if not is_causal:
        last_query = min(last_query, length - 1)
    votes_from = start - options.query_block_size if is_causal else start
    queries = query[:length] * scale
    sub_queries = _sub_queries(queries, ordinary[:length], votes_from, options)

    size = options.block_size
    blocks, covered_blocks = [], []
    for block in range(-(-length // size)):
        first_key, last_key = block * size, (block + 1) * size - 1
        if not is_causal:
            last_key = min(last_key, length - 1)
        elif last_key >= start:
            continue
        is_near = first_key >= last_query - window.left
        if not is_causal:
            assert window.right is not None
            is_near = is_near and last_key <= first_query + window.right
        (covered_blocks if is_near else blocks).append(block)

    def log_mass(block: int, sub_query: torch.Tensor) -> list[torch.Tensor]:
        scores = []
        sub_size = options.sub_block_size or size // FAN_OUT
        for first in range(block * size, (block + 1) * size, sub_size):
            inside = ordinary[first : first + sub_size]
            if inside.any():
                mean = key[first : first + sub_size][inside].mean(dim=0)
                scores.append(sub_query @ mean + inside.sum().log())
        return scores

    share, covered = dict.fromkeys(blocks, 0.0), 0.0
    for sub_query in sub_queries:
        of_block = {block: log_mass(block, sub_query) for block in blocks}
        anyway = [score for block in covered_blocks for score in log_mass(block, sub_query)]
        seen = is_global & valid
        if is_causal:
            seen = seen & (torch.arange(len(seen)) < start)
        anyway += list(key[seen] @ sub_query)
        every = anyway + [score for scores in of_block.values() for score in scores]
        total = torch.stack(every).logsumexp(dim=0) if every else torch.zeros(())
        for block, scores in of_block.items():
            for score in scores:
                share[block] += float((score - total).exp()) / len(sub_queries)
        covered += sum(float((score - total).exp()) for score in anyway) / len(sub_queries)
    return share, covered


def _sub_queries(
    query: torch.Tensor, ordinary: torch.Tensor, start: int, options: SelectionOptions
) -> list[torch.Tensor]:
    """The means of the ordinary queries in every run of a query block that has any."""
    means = []
    for first in range(start, start + options.query_block_size, options.tokens_per_vote):
        run = slice(first, first + options.tokens_per_vote)
        if first >= 0 and ordinary[run].any():
            means.append(query[run][ordinary[run]].mean(dim=0))
    return means


def reference_choice(share: dict[int, float], num_blocks: int) -> list[int]:
    """The blocks to read: the best, at most `num_blocks`, that have any soft mass."""
    ranked = sorted(share, key=lambda block: -share[block])
    return [block for block in ranked[:num_blocks] if share[block] > 0]
