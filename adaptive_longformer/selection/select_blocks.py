"""Adaptive selection: every block of queries looks for the blocks of keys that it should also read.

A block of queries votes with a few sub-queries. The vote for a node of the key pyramid is its soft
mass: the share of attention the sub-queries would give it, as far as its means and counts tell,
averaged over them. Short rows vote over all blocks at once. Longer ones start where the pyramid has
`start_nodes` nodes, keep the `beam_width` best, look at their children, and so on down to blocks:
O(length log length) time and O(length) memory. With `num_candidates` every query votes, and it
meets the keys themselves, see selection/exact.py.

The choice is discrete and carries no gradient; what is chosen is read by the attention itself, with
the same queries and keys, and that trains it.
"""

from typing import NamedTuple

import torch

from adaptive_longformer.attention.cuda_graphs import OUTSIDE_OF_GRAPHS
from adaptive_longformer.attention.global_keys import limit_global_tokens, pack_global_tokens
from adaptive_longformer.attention.padding import ordinary_tokens
from adaptive_longformer.patterns.sliding_window import SlidingWindow
from adaptive_longformer.selection.exact import exact_choice
from adaptive_longformer.selection.exact_call import ExactCall
from adaptive_longformer.selection.options import SelectionCall, SelectionOptions, ceil_div
from adaptive_longformer.selection.residual import ResidualScores
from adaptive_longformer.selection.rows import Batch, Row, SelectionTensors
from adaptive_longformer.selection.search import Search

# Devices that nobody waits for when numbers are read back; short rows save time there.
_READ_BACK = ("cpu",)


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
    options: SelectionOptions,
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
            must be real for a result that does not depend on padding, see `modeling.padding`.
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
            their soft mass times exp(score); what it dropped before is not ranked again. With
            `num_candidates` this runs in PyTorch.
        validate: raise on keys or queries that are not finite, which waits for the device.

    Raises:
        ValueError: `validate`, and a real token's query or key is NaN or infinite (without
            `validate` such query blocks choose nothing); or query and key do not fit together.
    """
    _check_call(query, key, options, is_causal, residual is not None)
    if validate:
        _check_finite(query, key, attention_mask)
    if max_global_tokens is not None and global_mask is not None:
        if attention_mask is not None:
            global_mask = global_mask & attention_mask
        global_mask = limit_global_tokens(global_mask, max_global_tokens)
    if query.device.type in _READ_BACK:
        max_global_tokens = None
    assert window.right is not None
    factor = query.shape[3] ** -0.5 if scale is None else scale
    call = SelectionCall(options, window.left, window.right, is_causal, factor, max_global_tokens)
    return SelectedBlocks(
        *selection_operator(
            query, key, attention_mask, global_mask, global_directions,
            *((None, None) if residual is None else residual), call.numbers(), call.scale,
        )
    )  # fmt: skip


def _check_call(
    query: torch.Tensor,
    key: torch.Tensor,
    options: SelectionOptions,
    is_causal: bool,
    has_residual: bool,
) -> None:
    if options.num_global_blocks and is_causal:
        raise ValueError(
            f"num_global_blocks is {options.num_global_blocks}, 0 is needed with is_causal: "
            "which blocks a whole row reads would tell earlier tokens about later ones"
        )
    if has_residual and is_causal:
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
    "adaptive_longformer::select_blocks", mutates_args=(), tags=OUTSIDE_OF_GRAPHS
)
def selection_operator(
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    global_mask: torch.Tensor | None,
    global_directions: torch.Tensor | None,
    residual_query: torch.Tensor | None,
    residual_key: torch.Tensor | None,
    numbers: list[int],
    scale: float,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]:  # fmt: skip
    """`select_blocks` as one operator, whose inside torch.compile need not see."""
    tensors = SelectionTensors(
        query, key, attention_mask, global_mask, global_directions, residual_query, residual_key
    )
    call = SelectionCall.from_numbers(numbers, scale)
    result = _empty_result(query, call.options)
    with torch.autocast(query.device.type, enabled=False):
        if call.options.num_candidates:
            _choose_exactly(tensors, call, result)
            return tuple(result)  # type: ignore[return-value]
        batch = Batch(tensors, call)
        for index in range(batch.size):
            _choose_of_row(Row(batch, index), SelectedBlocks(*(part[index] for part in result)))
    return tuple(result)  # type: ignore[return-value]


@selection_operator.register_fake
def _(query, key, mask, global_mask, directions, residual_query, residual_key, numbers, scale):
    return tuple(_empty_result(query, SelectionCall.from_numbers(numbers, scale).options))


def _empty_result(query: torch.Tensor, options: SelectionOptions) -> SelectedBlocks:
    batch, heads, length, head_dim = query.shape
    shape = (batch, heads, ceil_div(length, options.query_block_size))
    ranked, shared = options.num_blocks, options.num_global_blocks
    dtype = torch.promote_types(query.dtype, torch.float32)
    return SelectedBlocks(
        key_blocks=query.new_zeros(*shape, ranked, dtype=torch.int32),
        counts=query.new_zeros(shape, dtype=torch.int32),
        mass=query.new_zeros(*shape, ranked, dtype=dtype),
        covered=query.new_zeros(shape, dtype=dtype),
        global_blocks=query.new_zeros(batch, heads, shared, dtype=torch.int32),
        global_open=query.new_zeros(*shape, shared, dtype=torch.bool),
        global_means=query.new_zeros(batch, heads, shared, head_dim, dtype=dtype),
    )


def _choose_exactly(tensors: SelectionTensors, call: SelectionCall, result: SelectedBlocks) -> None:
    """Writes what the exact stage chooses into the result."""
    query, key, attention_mask, global_mask, *_ = tensors
    length, options = key.shape[2], call.options
    if global_mask is not None and attention_mask is not None:
        global_mask = global_mask & attention_mask
    members = ordinary_tokens(attention_mask, global_mask)
    ends = positions = shared = residual = None
    if attention_mask is not None:
        slot = torch.arange(1, length + 1, device=query.device)
        ends = (attention_mask * slot).amax(dim=1)
    if global_mask is not None:
        positions = pack_global_tokens(global_mask, call.max_global_tokens)
    if options.num_global_blocks:
        batch = Batch(tensors, call)
        shared = torch.full_like(result.global_blocks, -1)
        for index, of_row in enumerate(shared):
            row = Row(batch, index)
            found = _choose_global_blocks(row, SelectedBlocks(*(part[index] for part in result)))
            if found is not None:
                of_row[:, : found.shape[-1]] = found
    if tensors.residual_query is not None and tensors.residual_key is not None:
        residual = ResidualScores(tensors.residual_query, tensors.residual_key)
    choice = exact_choice(
        ExactCall(
            query,
            key,
            length,
            call.left,
            call.right,
            options.num_blocks,
            options.block_size,
            options.query_block_size,
            voters=members,
            key_counts=None if members is None else members.to(result.mass.dtype),
            ends=ends,
            global_positions=positions,
            is_causal=call.is_causal,
            scale=call.scale,
            shared_blocks=shared,
            residual=residual,
        ),
        options.num_candidates,
    )
    for name in ("key_blocks", "counts", "mass", "covered"):
        getattr(result, name).copy_(getattr(choice, name))


def _choose_of_row(row: Row, result: SelectedBlocks) -> None:
    """Writes what one row of the batch chooses into its views of the result."""
    shared = _choose_global_blocks(row, result)
    for start, end, level in row.chunks():
        search = Search(row, start, end)
        votes, candidates, is_open = search.run(level)
        scores = None
        if row.residual is not None:
            # Where the search begins with blocks, all of them are candidates.
            picked = None if level == 1 else candidates
            scores = row.residual.of_candidates(search.given, picked)
            scores = scores[..., : candidates.shape[-1]]
        if shared is not None:
            is_open = is_open & ~(candidates[..., None] == shared[:, None, None]).any(dim=-1)
        key_blocks, counts, mass = _best(
            votes.share, candidates, is_open, scores, row.options.num_blocks
        )
        found = key_blocks.shape[-1]
        result.key_blocks[:, search.given, :found] = key_blocks
        result.counts[:, search.given] = counts
        result.mass[:, search.given, :found] = mass
        result.covered[:, search.given] = votes.covered


def _choose_global_blocks(row: Row, result: SelectedBlocks) -> torch.Tensor | None:
    """The blocks that all query blocks of the row read, by direction . mean + log count: int64
    [heads, found], -1 where there is none; None where none are wanted.
    """
    wanted = row.options.num_global_blocks
    if not wanted or not row.num_blocks:
        return None
    means, log_counts = row.means[1], row.log_counts[1]
    scores = (means @ row.batch.global_directions[:, :, None])[..., 0] + log_counts
    scores = scores.masked_fill(scores.isnan(), -torch.inf)
    order = scores.sort(dim=-1, descending=True, stable=True).indices[:, :wanted]
    is_block = scores.gather(-1, order) > -torch.inf  # [heads, wanted]
    found = order.shape[-1]
    result.global_blocks[:, :found] = order.where(is_block, 0)
    first, last = row.covered(torch.arange(row.batch.num_rows, device=order.device))
    is_far = (order[:, None] < first[:, None]) | (order[:, None] > last[:, None])
    result.global_open[:, :, :found] = is_far & is_block[:, None]
    result.global_means[:, :found] = means.take_along_dim(order[..., None], dim=1)
    return order.where(is_block, -1)


def _best(
    share: torch.Tensor,
    candidates: torch.Tensor,
    is_open: torch.Tensor,
    residual_scores: torch.Tensor | None,
    num_blocks: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best blocks, how many of them count, and their mass."""
    # NaN is not above 0, and a block without any mass is not worth reading.
    is_open = is_open & (share > 0)
    share = share.masked_fill(~is_open, 0.0)
    ranked = share
    if residual_scores is not None:
        ranked = (share * residual_scores.exp()).masked_fill(~is_open, 0.0)
    ranked, order = ranked.sort(dim=-1, descending=True, stable=True)
    ranked, order = (found[..., :num_blocks] for found in (ranked, order))
    is_chosen = ranked > 0
    key_blocks = candidates.expand_as(share).gather(-1, order).where(is_chosen, 0)
    mass = share.gather(-1, order).masked_fill(~is_chosen, 0.0)
    return key_blocks.int(), is_chosen.sum(dim=-1).int(), mass
