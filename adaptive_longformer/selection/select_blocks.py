"""Adaptive selection: every block of queries looks for the blocks of keys that it should also read.

A block of queries votes with a few sub-queries. The vote for a node of the key pyramid is its soft
mass: the share of attention the sub-queries would give it, as far as its means and counts tell,
averaged over them. Short rows vote over all blocks at once. Longer ones start where the pyramid has
`start_nodes` nodes, keep the `beam_width` best, look at their children, and so on down to blocks:
O(length log length) time and O(length) memory.

The choice is discrete and carries no gradient; what is chosen is read by the attention itself, with
the same queries and keys, and that trains it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch.nn import functional as F

from adaptive_longformer.attention.cuda_graphs import OUTSIDE_OF_GRAPHS
from adaptive_longformer.attention.global_rows import limit_global_tokens, pack_global_tokens
from adaptive_longformer.patterns.block_layout import (
    BlockLayout,
    EntryFlag,
    known_right,
    window_entries,
)
from adaptive_longformer.patterns.sliding_window import SlidingWindow
from adaptive_longformer.selection.compiled_vote import can_vote, vote
from adaptive_longformer.selection.pyramid import FAN_OUT, key_pyramid
from adaptive_longformer.selection.residual import ResidualScores

# Scores in memory at a time, by device.
_CHUNK_SCORES = {"cpu": 2**20, "cuda": 2**25}
_NO_NODE = 2**30
_ROUTED, _FULL = int(EntryFlag.ROUTED), int(EntryFlag.FULL)


@dataclass(frozen=True)
class RoutingOptions:
    """How blocks are chosen.

    Attributes:
        num_blocks: blocks chosen per query block, at most.
        block_size: tokens per key block, a multiple of 4.
        query_block_size: tokens per query block, a multiple of `tokens_per_vote`.
        start_nodes: nodes that the search may start from; rows with no more blocks are searched
            exactly.
        beam_width: nodes kept per level.
        tokens_per_vote: queries averaged into one sub-query; 1 lets every token vote.
        num_global_blocks: blocks chosen for all query blocks of a row together.
        sub_block_size: keys averaged into one summary when blocks are compared, a divisor of
            `block_size`; 0: a quarter of a block. Fewer find smaller things, at more cost.

    Raises:
        ValueError: a number is out of range, or the sizes do not nest.
    """

    num_blocks: int = 8
    block_size: int = 64
    query_block_size: int = 64
    start_nodes: int = 256
    beam_width: int = 64
    tokens_per_vote: int = 4
    num_global_blocks: int = 0
    sub_block_size: int = 0

    def __post_init__(self) -> None:
        for name in ("num_blocks", "start_nodes", "beam_width", "tokens_per_vote"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"RoutingOptions: {name} is {value}, at least 1 is needed")
        if self.num_global_blocks < 0:
            raise ValueError(
                f"RoutingOptions: num_global_blocks is {self.num_global_blocks}, "
                "at least 0 is needed"
            )
        size = self.sub_block_size
        if self.block_size < 4 or self.block_size % 4:
            raise ValueError(
                f"RoutingOptions: block_size is {self.block_size}, a multiple of 4 is needed"
            )
        if size < 0 or (size and self.block_size % size):
            raise ValueError(
                f"RoutingOptions: sub_block_size is {size}, a divisor of block_size = "
                f"{self.block_size}, or 0 for a quarter of it, is needed"
            )
        if self.query_block_size < 1 or self.query_block_size % self.tokens_per_vote:
            raise ValueError(
                f"RoutingOptions: query_block_size is {self.query_block_size}, a multiple of "
                f"tokens_per_vote = {self.tokens_per_vote} is needed"
            )

    @property
    def sub_blocks(self) -> int:
        """Summaries per block."""
        return self.block_size // self.sub_block_size if self.sub_block_size else FAN_OUT

    def fan_out(self, level: int) -> int:
        """Children of a node of a level."""
        return self.sub_blocks if level == 1 else FAN_OUT

    def start_level(self, num_blocks: int) -> int:
        """The finest level at which a row of `num_blocks` blocks has at most `start_nodes`
        nodes.
        """
        level = 1
        while _ceil_div(num_blocks, FAN_OUT ** (level - 1)) > self.start_nodes:
            level += 1
        return level

    def visited_nodes(self, num_blocks: int) -> int:
        """Nodes that one query block of such a row scores as candidates, all levels together."""
        level = self.start_level(num_blocks)
        start = _ceil_div(num_blocks, FAN_OUT ** (level - 1))
        return start + (level - 1) * min(start, self.beam_width) * FAN_OUT


class SelectedBlocks(NamedTuple):
    """What the blocks of queries chose, best first.

    Attributes:
        key_blocks: int32 [batch, heads, query_blocks, num_blocks]; 0 beyond the count.
        counts: int32 [batch, heads, query_blocks].
        mass: float, shape of key_blocks: the soft mass of each; 0 beyond the count.
        covered: float [batch, heads, query_blocks], the soft mass of what is read anyway: blocks
            that the window covers, and global tokens.
        global_blocks: int32 [batch, heads, num_global_blocks], chosen for the whole row.
        global_open: bool [batch, heads, query_blocks, num_global_blocks], whether a query block
            reads it through the list (False where the window covers it or the row has no such
            block).
        global_means: float [batch, heads, num_global_blocks, head_dim], the mean key of each.
    """

    key_blocks: torch.Tensor
    counts: torch.Tensor
    mass: torch.Tensor
    covered: torch.Tensor
    global_blocks: torch.Tensor
    global_open: torch.Tensor
    global_means: torch.Tensor


@torch.no_grad()
def select_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    window: SlidingWindow,
    options: RoutingOptions,
    *,
    attention_mask: torch.Tensor | None = None,
    global_mask: torch.Tensor | None = None,
    max_global_tokens: int | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    global_directions: torch.Tensor | None = None,
    residual: ResidualScores | None = None,
    validate: bool = False,
) -> SelectedBlocks:
    """Chooses for every query block the key blocks with the largest soft mass.

    Blocks that the window covers for all queries of the block are not chosen, nor are empty ones;
    padding and global tokens do not count at all. A row chooses fewer than `num_blocks` where there
    are no more that have any.

    Args:
        query: [batch, heads, length, head_dim]. With is_causal they may be the last ones of the row
            only, from the start of a query block on, as in cached decoding: the first of their
            blocks then chooses nothing, as the queries that vote for it are missing.
        key: [batch, key_heads, length, head_dim], key_heads a divisor of heads.
        window: what is read anyway; without holes.
        options: sizes and limits.
        attention_mask: bool [batch, length], True for a real token. The first token of each row
            must be real for a result that does not depend on padding, see `alignment`.
        global_mask: bool [batch, length]: global tokens, which neither vote nor are chosen.
        max_global_tokens: at most this many tokens of a sequence are global, the first ones. On a
            GPU nothing is then read back from it, which CUDA graphs need: padded rows start their
            search at the level of the length with the padding, and only where that has more than
            `start_nodes` blocks can this change what they choose. None: no limit.
        is_causal: a block is chosen only if it ends before the query block begins, and by the
            queries of the query block before.
        scale: factor of the scores; None: head_dim**-0.5.
        global_directions: [heads, head_dim]; with `num_global_blocks` the blocks with the largest
            direction . mean key + log count are chosen for all query blocks of a row.
        residual: learned scores of pairs of blocks. Where the search ends, blocks are ranked by
            their soft mass times exp(score); what it dropped before is not ranked again.
        validate: raise on keys or queries that are not finite, which waits for the device.

    Raises:
        ValueError: `validate`, and a real token's query or key is NaN or infinite (without
            `validate` such query blocks choose nothing); or query and key do not fit together.
    """
    if options.num_global_blocks and is_causal:
        raise ValueError(
            f"num_global_blocks is {options.num_global_blocks}, 0 is needed with is_causal: "
            "which blocks a whole row reads would tell earlier tokens about later ones"
        )
    if residual is not None and is_causal:
        raise ValueError(
            "residual is given, None is needed with is_causal: the mean query of a block would "
            "tell its first tokens about its last ones"
        )
    missing = key.shape[2] - query.shape[2]
    if missing < 0 or missing % options.query_block_size or (missing and not is_causal):
        raise ValueError(
            f"query has {query.shape[2]} tokens and key {key.shape[2]}: the same number is needed, "
            f"or with is_causal a multiple of query_block_size = {options.query_block_size} fewer"
        )
    if validate:
        _check_finite(query, key, attention_mask)
    if global_directions is None:
        global_directions = query.new_zeros(query.shape[1], query.shape[3])
    residual_query, residual_key = (None, None) if residual is None else residual
    if max_global_tokens is not None and global_mask is not None:
        if attention_mask is not None:
            global_mask = global_mask & attention_mask
        global_mask = limit_global_tokens(global_mask, max_global_tokens)
    if query.device.type == "cpu":
        max_global_tokens = None  # nobody waits for a CPU, and short rows save time there
    assert window.right is not None
    return SelectedBlocks(
        *route_blocks(
            query, key, attention_mask, global_mask, global_directions,
            residual_query, residual_key,
            window.left, window.right, is_causal,
            query.shape[3] ** -0.5 if scale is None else scale,
            options.num_blocks, options.block_size, options.query_block_size, options.start_nodes,
            options.beam_width, options.tokens_per_vote, options.num_global_blocks,
            options.sub_block_size, max_global_tokens,
        )
    )  # fmt: skip


def selection_layout(
    selected: SelectedBlocks,
    window: SlidingWindow,
    length: int,
    options: RoutingOptions,
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
        chosen block an entry is, 0 for the best, num_blocks and up for those of the whole row, -1
        for the window and the filling.
    """
    device = selected.key_blocks.device
    query_size, key_size = options.query_block_size, options.block_size
    near_blocks, near_flags = window_entries(
        window, length, query_size, key_size, device, reach
    )  # [heads or 1, query_blocks, width]
    batch, heads, rows, num_ranked = selected.key_blocks.shape
    rank = torch.arange(num_ranked, device=device)
    counts = selected.counts
    if rank_limit is not None:
        counts = torch.minimum(counts, rank_limit[:, None].to(counts.dtype))
    far, far_counts = selected.key_blocks, counts
    far_slots = rank.expand_as(far)
    if selected.global_blocks.shape[-1]:
        shared = selected.global_blocks[:, :, None].expand(-1, -1, rows, -1)
        shared_slots = torch.arange(shared.shape[-1], device=device) + num_ranked
        used = torch.cat([rank < counts[..., None], selected.global_open], dim=-1)
        order = torch.argsort(used.int(), dim=-1, descending=True, stable=True)
        far = torch.cat([far, shared], dim=-1).gather(-1, order)
        far_slots = torch.cat([far_slots, shared_slots.expand_as(shared)], dim=-1)
        far_slots = far_slots.gather(-1, order)
        far_counts = used.sum(dim=-1, dtype=torch.int32)

    near_counts = (near_flags != 0).sum(dim=-1, keepdim=True)  # [..., query_blocks, 1]
    position = torch.arange(near_blocks.shape[-1] + far.shape[-1], device=device)
    is_near = position < near_counts  # [heads or 1, query_blocks, entries]
    counts = near_counts[..., 0] + far_counts
    used = position < counts[..., None]
    near_index = position.clamp(max=near_blocks.shape[-1] - 1).expand(*near_blocks.shape[:2], -1)
    far_index = (position - near_counts).clamp(0, far.shape[-1] - 1)
    far_index = far_index.expand(batch, heads, -1, -1)
    key_blocks = torch.where(is_near, near_blocks.gather(-1, near_index), 0)
    key_blocks = torch.where(is_near, key_blocks, far.gather(-1, far_index))
    key_blocks = torch.where(used, key_blocks, 0).int()
    assert window.right is not None
    start = torch.arange(rows, device=device)[:, None] * query_size
    first = key_blocks * key_size
    is_outside = (first + key_size - 1 < start - window.left) | (
        first > start + query_size - 1 + window.right
    )
    routed_flags = torch.where(is_outside, _ROUTED | _FULL, _ROUTED)
    flags = torch.where(is_near, near_flags.gather(-1, near_index), routed_flags)
    slots = torch.where(is_near | ~used, -1, far_slots.gather(-1, far_index))
    layout = BlockLayout(
        key_blocks=key_blocks,
        counts=counts.int(),
        flags=torch.where(used, flags, 0).int(),
        query_block_size=query_size,
        key_block_size=key_size,
        length=length,
        window=window,
    )
    return known_right(layout), slots


def _check_finite(
    query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None
) -> None:
    for name, tensor in (("query", query), ("key", key)):
        is_bad = ~tensor.isfinite().all(dim=-1)  # [batch, heads, length]
        missing = key.shape[2] - tensor.shape[2]
        if attention_mask is not None:
            is_bad = is_bad & attention_mask[:, None, missing:]
        if is_bad.any():
            batch, head, token = is_bad.nonzero()[0].tolist()
            raise ValueError(
                f"{name} is NaN or infinite at batch row {batch}, head {head}, token "
                f"{token + missing} and "
                f"{int(is_bad.sum()) - 1} more: finite values are needed to select blocks"
            )


@torch.library.custom_op(
    "adaptive_longformer::route_blocks", mutates_args=(), tags=OUTSIDE_OF_GRAPHS
)
def route_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    global_mask: torch.Tensor | None,
    global_directions: torch.Tensor,
    residual_query: torch.Tensor | None,
    residual_key: torch.Tensor | None,
    left: int,
    right: int,
    is_causal: bool,
    scale: float,
    num_blocks: int,
    block_size: int,
    query_block_size: int,
    start_nodes: int,
    beam_width: int,
    tokens_per_vote: int,
    num_global_blocks: int,
    sub_block_size: int,
    max_global_tokens: int | None,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]:  # fmt: skip
    """`select_blocks` as one operator, whose inside torch.compile need not see."""
    options = RoutingOptions(
        num_blocks, block_size, query_block_size, start_nodes, beam_width, tokens_per_vote,
        num_global_blocks, sub_block_size,
    )  # fmt: skip
    with torch.autocast(query.device.type, enabled=False):
        router = _Router(
            query, key, attention_mask, global_mask, global_directions, residual_query,
            residual_key, left, right, is_causal, scale, options, max_global_tokens,
        )  # fmt: skip
        selected = router.run()
    return (
        selected.key_blocks, selected.counts, selected.mass, selected.covered,
        selected.global_blocks, selected.global_open, selected.global_means,
    )  # fmt: skip


@route_blocks.register_fake
def _(
    query,
    key,
    attention_mask,
    global_mask,
    global_directions,
    residual_query,
    residual_key,
    left,
    right,
    is_causal,
    scale,
    num_blocks,
    block_size,
    query_block_size,
    start_nodes,
    beam_width,
    tokens_per_vote,
    num_global_blocks,
    sub_block_size,
    max_global_tokens,
):
    return tuple(_empty_result(query, query_block_size, num_blocks, num_global_blocks))


def _empty_result(
    query: torch.Tensor, query_block_size: int, num_blocks: int, num_global_blocks: int
) -> SelectedBlocks:
    batch, heads, length, head_dim = query.shape
    rows = (length + query_block_size - 1) // query_block_size
    dtype = torch.promote_types(query.dtype, torch.float32)
    return SelectedBlocks(
        key_blocks=query.new_zeros(batch, heads, rows, num_blocks, dtype=torch.int32),
        counts=query.new_zeros(batch, heads, rows, dtype=torch.int32),
        mass=query.new_zeros(batch, heads, rows, num_blocks, dtype=dtype),
        covered=query.new_zeros(batch, heads, rows, dtype=dtype),
        global_blocks=query.new_zeros(batch, heads, num_global_blocks, dtype=torch.int32),
        global_open=query.new_zeros(batch, heads, rows, num_global_blocks, dtype=torch.bool),
        global_means=query.new_zeros(batch, heads, num_global_blocks, head_dim, dtype=dtype),
    )


class _Votes(NamedTuple):
    """The outcome of one vote.

    Attributes:
        share: [heads, rows, candidates], soft mass of each candidate, averaged over sub-queries.
        covered: [heads, rows], soft mass of what is read anyway.
        weights: [heads, rows, sub_queries, fan_out * candidates], exp(score - peak) of their
            children.
        peak, others: [heads, rows, sub_queries], and the sum of all weights that are not covered.
    """

    share: torch.Tensor
    covered: torch.Tensor
    weights: torch.Tensor
    peak: torch.Tensor
    others: torch.Tensor


class _Router:
    """One call of `route_blocks`; walks over batch rows and chunks of query blocks."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        attention_mask: torch.Tensor | None,
        global_mask: torch.Tensor | None,
        global_directions: torch.Tensor,
        residual_query: torch.Tensor | None,
        residual_key: torch.Tensor | None,
        left: int,
        right: int,
        is_causal: bool,
        scale: float,
        options: RoutingOptions,
        max_global_tokens: int | None,
    ) -> None:
        self.batch, self.heads, _, self.head_dim = query.shape
        self.length = key.shape[2]
        # Query blocks before those of `query`.
        self.first_row = (self.length - query.shape[2]) // options.query_block_size
        self.device, self.options, self.is_causal = query.device, options, is_causal
        self.left, self.right = left, right
        self.result = _empty_result(
            query, options.query_block_size, options.num_blocks, options.num_global_blocks
        )
        self.dtype = self.result.mass.dtype
        self.num_rows = self.result.counts.shape[2]
        if global_mask is not None and attention_mask is not None:
            global_mask = global_mask & attention_mask
        members = attention_mask
        if global_mask is not None:
            members = ~global_mask if members is None else members & ~global_mask
        # Where every row ends, and the length that its search is made for.
        self.ends = self.lengths = [self.length] * self.batch
        if attention_mask is not None and not is_causal:
            slot = torch.arange(1, self.length + 1, device=self.device)
            self.ends = (attention_mask * slot).amax(dim=1)
            if max_global_tokens is None:
                self.ends = self.lengths = self.ends.tolist()
        longest = max(self.lengths, default=0)
        num_levels = options.start_level(_ceil_div(longest, options.block_size))
        num_levels = max(num_levels, 2 if options.num_global_blocks else 1)
        sub_block_size = options.block_size // options.sub_blocks
        self.pyramid = key_pyramid(key, members, sub_block_size, num_levels, options.sub_blocks)
        self._repeat_heads(key.shape[1])
        # [batch, heads, query_blocks, sub_queries, head_dim], [batch or 1, query_blocks, ...]
        queries, self.is_voter = self._sub_queries(query, members)
        self.queries = queries * scale
        self.global_positions = None
        if global_mask is not None:
            # [batch, G], `length` as filling
            positions = pack_global_tokens(global_mask, max_global_tokens)
            if positions.shape[1]:
                self.global_positions = positions
                index = positions.clamp(max=self.length - 1)[:, None, :, None]
                picked = key.take_along_dim(index, dim=2).to(self.dtype)
                self.global_keys = picked.repeat_interleave(self.heads // key.shape[1], dim=1)
        self.global_directions = global_directions.to(self.dtype)
        self.residual = None
        if residual_query is not None and residual_key is not None:
            factors = (residual_query.to(self.dtype), residual_key.to(self.dtype))
            self.residual = ResidualScores(*factors)

    def _repeat_heads(self, key_heads: int) -> None:
        if key_heads != self.heads:
            repeats = self.heads // key_heads
            means = [mean.repeat_interleave(repeats, dim=1) for mean in self.pyramid.means]
            self.pyramid = self.pyramid._replace(means=means)

    def _sub_queries(
        self, query: torch.Tensor, members: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        options = self.options
        if members is not None:
            members = members[:, self.length - query.shape[2] :]
        votes = key_pyramid(query, members, options.tokens_per_vote, 1)
        per_row = options.query_block_size // options.tokens_per_vote
        needed = self.num_rows * per_row
        means, log_counts = votes.means[0][:, :, :needed], votes.log_counts[0][:, :needed]
        filler = needed - means.shape[2]
        means = F.pad(means, (0, 0, 0, filler)).unflatten(2, (-1, per_row))
        is_voter = F.pad(log_counts, (0, filler), value=-torch.inf) > -torch.inf
        is_voter = is_voter.unflatten(1, (-1, per_row))
        if self.is_causal:
            # The queries of a block would tell its first tokens about its last ones.
            means = F.pad(means, (0, 0, 0, 0, 1, 0))[:, :, :-1]
            is_voter = F.pad(is_voter, (0, 0, 1, 0), value=False)[:, :-1]
        return means, is_voter

    def run(self) -> SelectedBlocks:
        for batch in range(self.batch):
            row = _Row(self, batch)
            row.choose_global_blocks()
            for start, end, level in row.chunks():
                row.route(start, end, level)
        return self.result


class _Row:
    """One batch row. Tensors are [heads, rows, ...], rows being a chunk of query blocks."""

    def __init__(self, router: _Router, batch: int) -> None:
        self.router, self.options = router, router.options
        self.length, self.end = router.lengths[batch], router.ends[batch]
        self.num_blocks = _ceil_div(self.length, self.options.block_size)
        pyramid = router.pyramid
        self.means = [mean[batch] for mean in pyramid.means]  # each [heads, nodes, head_dim]
        self.log_counts = [
            log_count[batch if log_count.shape[0] > 1 else 0] for log_count in pyramid.log_counts
        ]
        self.queries = router.queries[batch]
        self.is_voter = router.is_voter[batch if router.is_voter.shape[0] > 1 else 0]
        self.global_positions = None
        if router.global_positions is not None:
            self.global_keys = router.global_keys[batch]  # [heads, G, head_dim]
            self.global_positions = router.global_positions[batch]
        self.result = SelectedBlocks(*(tensor[batch] for tensor in router.result))  # views
        self.global_blocks: torch.Tensor | None = None
        self.residual: ResidualScores | None = None
        if router.residual is not None:
            self.residual = ResidualScores(*(factor[batch] for factor in router.residual))

    @property
    def covered_width(self) -> int:
        """At least as many blocks as the window covers for any query block."""
        width = (self.router.left + self.router.right) // self.options.block_size + 2
        return min(width, self.num_blocks)

    def covered(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The first and last key block that the window covers for all queries of each query
        block.
        """
        size, start = self.options.block_size, rows * self.options.query_block_size
        end = start + self.options.query_block_size - 1
        if self.router.is_causal:
            # Before the query block only, and whatever the length, for cached decoding.
            last = start // size - 1
        else:
            end = end.clamp(max=self.end - 1)
            reach = start + self.router.right
            last = torch.where(reach >= self.end - 1, self.num_blocks - 1, (reach + 1) // size - 1)
        first = ((end - self.router.left).clamp(min=0) + size - 1) // size
        return first, last

    def limit(self, rows: torch.Tensor) -> torch.Tensor:
        """The number of blocks, from the first, that each query block may choose from."""
        if not self.router.is_causal:
            return torch.full_like(rows, self.num_blocks)
        first, last = self.covered(rows)
        return torch.minimum(first, last + 1).clamp(min=0)

    @cached_property
    def limits(self) -> list[int]:
        """The same for all query blocks, without the device."""
        num_rows = _ceil_div(self.length, self.options.query_block_size)
        if not self.router.is_causal:
            return [self.num_blocks] * num_rows
        return self.limit(torch.arange(num_rows)).tolist()

    def chunks(self) -> Iterator[tuple[int, int, int]]:
        """Runs of query blocks [start, end) that begin their search at the same level."""
        options = self.options
        num_rows = _ceil_div(self.length, options.query_block_size)
        limits = self.limits
        # Under causality nobody votes for the first of the query blocks.
        start = self.router.first_row + int(self.router.is_causal)
        while start < num_rows:
            level = options.start_level(limits[start])
            columns = max(FAN_OUT, options.sub_blocks) * max(
                _ceil_div(limits[start], FAN_OUT ** (level - 1)),
                (options.beam_width + 1) * FAN_OUT if level > 1 else 1,
                self.covered_width,
            )
            # The means that a search gathers are head_dim numbers per column, the scores one per
            # vote.
            per_column = max(self.queries.shape[2], self.queries.shape[3] // 4)
            scores = self.router.heads * per_column * columns
            step = max(1, _CHUNK_SCORES.get(self.router.device.type, 2**20) // max(scores, 1))
            end = start + 1
            while end < min(start + step, num_rows) and options.start_level(limits[end]) == level:
                end += 1
            if limits[end - 1] > 0:
                yield start, end, level
            start = end

    def choose_global_blocks(self) -> None:
        """The blocks that all query blocks of the row read, by direction . mean + log count."""
        wanted = self.options.num_global_blocks
        if not wanted or not self.num_blocks:
            return
        means, log_counts = self.means[1], self.log_counts[1]
        scores = (means @ self.router.global_directions[:, :, None])[..., 0] + log_counts
        scores = scores.masked_fill(scores.isnan(), -torch.inf)
        order = scores.sort(dim=-1, descending=True, stable=True).indices[:, :wanted]
        is_block = scores.gather(-1, order) > -torch.inf  # [heads, wanted]
        found = order.shape[-1]
        self.result.global_blocks[:, :found] = order.where(is_block, 0)
        first, last = self.covered(torch.arange(self.router.num_rows, device=order.device))
        is_far = (order[:, None] < first[:, None]) | (order[:, None] > last[:, None])
        self.result.global_open[:, :, :found] = is_far & is_block[:, None]
        self.result.global_means[:, :found] = means.take_along_dim(order[..., None], dim=1)
        self.global_blocks = order.where(is_block, -1)

    def route(self, start: int, end: int, level: int) -> None:
        """Searches for the query blocks [start, end), beginning at a level of the pyramid."""
        search = _Search(self, start, end)
        kept = None
        votes, candidates, is_open = search.vote_all(level)
        while level > 1:
            kept = search.keep(votes, candidates, is_open, level)
            level -= 1
            votes, candidates, is_open = search.vote_children(kept, level)
        rows = slice(start - self.router.first_row, end - self.router.first_row)
        scores = None
        if self.residual is not None:
            scores = self.residual.of_candidates(rows, None if kept is None else candidates)
            scores = scores[..., : candidates.shape[-1]]
        key_blocks, counts, mass = self._choose(votes.share, candidates, is_open, scores)
        found = key_blocks.shape[-1]
        self.result.key_blocks[:, rows, :found] = key_blocks
        self.result.counts[:, rows] = counts
        self.result.mass[:, rows, :found] = mass
        self.result.covered[:, rows] = votes.covered

    def _choose(
        self,
        share: torch.Tensor,
        candidates: torch.Tensor,
        is_open: torch.Tensor,
        residual_scores: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The best blocks, how many of them count, and their mass."""
        if self.global_blocks is not None:
            is_shared = (candidates[..., None] == self.global_blocks[:, None, None]).any(dim=-1)
            is_open = is_open & ~is_shared
        # NaN is not above 0, and a block without any mass is not worth reading.
        is_open = is_open & (share > 0)
        share = share.masked_fill(~is_open, 0.0)
        ranked = share
        if residual_scores is not None:
            ranked = (share * residual_scores.exp()).masked_fill(~is_open, 0.0)
        ranked, order = ranked.sort(dim=-1, descending=True, stable=True)
        ranked, order = (found[..., : self.options.num_blocks] for found in (ranked, order))
        mass = share.gather(-1, order)
        is_chosen = ranked > 0
        key_blocks = candidates.expand_as(share).gather(-1, order).where(is_chosen, 0)
        counts = is_chosen.sum(dim=-1)
        return key_blocks.int(), counts.int(), mass.masked_fill(~is_chosen, 0.0)


class _Search:
    """The search of a chunk of query blocks through the pyramid."""

    def __init__(self, row: _Row, start: int, end: int) -> None:
        rows = torch.arange(start, end, device=row.router.device)
        self.row, self.rows = row, rows
        self.is_causal, self.beam_width = row.router.is_causal, row.options.beam_width
        given = slice(start - row.router.first_row, end - row.router.first_row)
        self.queries = row.queries[:, given]  # [heads, rows, votes, head_dim]
        is_voter = row.is_voter[given].to(self.queries.dtype)
        # A sub-query's weight in the mean, [rows, votes].
        self.voter_weight = is_voter / is_voter.sum(dim=-1, keepdim=True).clamp(min=1.0)
        self.limit, self.last_limit = row.limit(rows), row.limits[end - 1]
        self.first_covered, self.last_covered = row.covered(rows)
        self.log_covered = self._log_covered()  # [heads, rows, votes]
        self.log_dropped = torch.full_like(self.log_covered, -torch.inf)

    def _log_covered(self) -> torch.Tensor:
        """Logarithm of the mass of global tokens and of the blocks that the window covers."""
        parts = [self.queries.new_full(self.queries.shape[:3], -torch.inf)]
        row, rows = self.row, self.rows
        if row.global_positions is not None:
            scores = self.queries.flatten(1, 2) @ row.global_keys.mT
            end = rows[:, None, None] * row.options.query_block_size
            is_seen = row.global_positions < (end if self.is_causal else row.router.length)
            scores = scores.unflatten(1, (len(rows), -1)).masked_fill(~is_seen, -torch.inf)
            parts.append(scores.logsumexp(dim=-1))
        blocks = torch.arange(row.covered_width, device=rows.device) + self.first_covered[:, None]
        run = row.options.sub_blocks
        is_closed = (blocks > self.last_covered[:, None]).repeat_interleave(run, dim=-1)
        scores, log_counts = self._gather(blocks.expand(self.queries.shape[0], -1, -1), 0, run)
        scores += log_counts.masked_fill(is_closed, -torch.inf)[:, :, None]
        parts.append(scores.logsumexp(dim=-1))
        return torch.stack(parts).logsumexp(dim=0)

    def _gather(
        self, nodes: torch.Tensor, level: int, run: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the descendants, at a level, of nodes above it would get.

        Args:
            nodes: int64 [heads, rows, width]; beyond the level's end they have no descendants.
            level: of the descendants.
            run: descendants per node.

        Returns:
            Scores of their means [heads, rows, sub_queries, width * run], and their log counts
            [heads, rows, width * run].
        """
        heads, rows, width = nodes.shape
        means, log_counts = self.row.means[level], self.row.log_counts[level]
        num_runs = means.shape[1] // run
        index = nodes.clamp(0, num_runs - 1)
        head = torch.arange(heads, device=nodes.device)[:, None, None]
        flat = (index + head * num_runs).flatten()
        picked = means.reshape(heads * num_runs, -1).index_select(0, flat)
        picked = picked.view(heads * rows, width * run, -1)
        scores = torch.bmm(self.queries.reshape(heads * rows, -1, picked.shape[-1]), picked.mT)
        log_counts = log_counts.view(num_runs, run).index_select(0, index.flatten())
        log_counts = log_counts.masked_fill_((nodes >= num_runs).view(-1, 1), -torch.inf)
        return scores.view(heads, rows, -1, width * run), log_counts.view(heads, rows, -1)

    def vote_all(self, level: int) -> tuple[_Votes, torch.Tensor, torch.Tensor]:
        """The vote over all nodes of a level: votes, candidates [1, 1, nodes], and which are
        open.
        """
        rows = self.queries.shape[1]
        span = FAN_OUT ** (level - 1)
        num_nodes = _ceil_div(self.row.num_blocks, span)
        if self.is_causal:
            num_nodes = min(num_nodes, _ceil_div(self.last_limit, span))
        num_nodes = max(num_nodes, 1)
        candidates = torch.arange(num_nodes, device=self.rows.device).view(1, 1, -1)
        children = slice(0, num_nodes * self.row.options.fan_out(level))
        means = self.row.means[level - 1][:, children]
        scores = (self.queries.flatten(1, 2) @ means.mT).unflatten(1, (rows, -1))
        bias = self.row.log_counts[level - 1][children].expand(1, rows, -1)
        bias = self._close(bias, candidates, level)
        fan_out = self.row.options.fan_out(level)
        return self._vote(scores, bias, fan_out), candidates, _is_open(bias, fan_out)

    def keep(
        self, votes: _Votes, candidates: torch.Tensor, is_open: torch.Tensor, level: int
    ) -> torch.Tensor:
        """The best nodes of a level, int64 [heads, rows, kept], with the node that is cut by the
        limit under causality; what is dropped stays in the denominator of later votes.
        """
        width = min(self.beam_width, votes.share.shape[-1])
        share = votes.share.masked_fill(~is_open, -1.0)
        order = share.topk(width, dim=-1).indices.sort(dim=-1).values
        is_kept = torch.zeros_like(share).scatter_(-1, order, 1.0)
        kept_weight = votes.weights @ is_kept.repeat_interleave(FAN_OUT, -1)[..., None]
        dropped = (votes.others - kept_weight[..., 0]).clamp(min=0.0)
        self.log_dropped = votes.peak + dropped.log()
        kept = candidates.expand_as(share).gather(-1, order)
        if self.is_causal:
            # The node that the limit cuts is always split, and by this copy only.
            kept = kept.where(is_open.expand_as(share).gather(-1, order), _NO_NODE)
            cut = self.limit // FAN_OUT ** (level - 1)
            kept = torch.cat([kept, cut[None, :, None].expand(kept.shape[0], -1, -1)], dim=-1)
        return kept

    def vote_children(
        self, kept: torch.Tensor, level: int
    ) -> tuple[_Votes, torch.Tensor, torch.Tensor]:
        """The vote over the children, at a level, of the nodes kept above it."""
        offsets = torch.arange(FAN_OUT, device=kept.device)
        candidates = (kept[..., None] * FAN_OUT + offsets).flatten(-2)
        run = FAN_OUT * self.row.options.fan_out(level)
        scores, log_counts = self._gather(kept, level - 1, run)
        bias = self._close(log_counts, candidates, level)
        fan_out = self.row.options.fan_out(level)
        return self._vote(scores, bias, fan_out), candidates, _is_open(bias, fan_out)

    def _close(self, bias: torch.Tensor, candidates: torch.Tensor, level: int) -> torch.Tensor:
        """A bias of the candidates' children, -inf where they may not be chosen.

        Args:
            bias: [heads or 1, rows, fan_out * candidates].
            candidates: nodes of `level`, int64 [heads or 1, rows or 1, candidates].
        """
        span = FAN_OUT ** (level - 1)  # blocks per candidate
        if level > 1:
            offsets = torch.arange(FAN_OUT, device=candidates.device)
            children = (candidates[..., None] * FAN_OUT + offsets).flatten(-2)
            first = children * (span // FAN_OUT)
            last = (first + span // FAN_OUT).clamp(max=self.row.num_blocks) - 1
        else:
            first = last = candidates.repeat_interleave(self.row.options.sub_blocks, dim=-1)
        is_covered = (first >= self.first_covered[:, None]) & (last <= self.last_covered[:, None])
        if self.is_causal:
            ends = (candidates + 1) * span
            is_cut = ends > self.limit[:, None]
            is_cut = is_cut.repeat_interleave(self.row.options.fan_out(level), dim=-1)
            is_covered = is_covered | is_cut
        return bias.masked_fill(is_covered, -torch.inf)

    def _vote(self, scores: torch.Tensor, bias: torch.Tensor, fan_out: int) -> _Votes:
        """Soft mass of candidates from the scores of their children, which it overwrites.

        Args:
            scores: [heads, rows, sub_queries, fan_out * candidates].
            bias: [heads or 1, rows, fan_out * candidates].
            fan_out: children per candidate.
        """
        if can_vote(scores):
            share, covered, peak, others = vote(
                scores, bias, self.log_covered, self.log_dropped, self.voter_weight, fan_out
            )
            return _Votes(share, covered, scores, peak, others)
        scores += bias[:, :, None]
        peak = torch.maximum(scores.amax(dim=-1), self.log_covered)
        peak = torch.maximum(peak, self.log_dropped).clamp(min=torch.finfo(scores.dtype).min)
        weights = scores.sub_(peak[..., None]).exp_()
        covered = (self.log_covered - peak).exp()
        others = weights.sum(dim=-1) + (self.log_dropped - peak).exp()
        total = (others + covered).clamp(min=torch.finfo(scores.dtype).tiny)
        share_of_one = self.voter_weight / total  # [heads, rows, sub_queries]
        share = (share_of_one[:, :, None] @ weights)[:, :, 0]
        share = share.unflatten(-1, (-1, fan_out)).sum(dim=-1)
        return _Votes(share, (share_of_one * covered).sum(dim=-1), weights, peak, others)


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def _is_open(bias: torch.Tensor, fan_out: int) -> torch.Tensor:
    """Which candidates have a child that may be chosen, from their children's bias."""
    return (bias > -torch.inf).unflatten(-1, (-1, fan_out)).any(dim=-1)
