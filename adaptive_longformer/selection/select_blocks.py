"""Adaptive selection: every block of queries looks for the blocks of keys that it should also read.

All queries of a block vote, and meet the keys of its candidates themselves: a block of keys gets
the share of their attention that its keys would get, averaged over the queries, and those with the
largest mass are chosen, or some in proportion to it (sampling.py). In short rows all blocks are
candidates. In longer ones candidates are what a coarser stage keeps, the same choice among means of
keys: O(length log length) time and O(length) memory. See selection/exact.py.

The choice is discrete and carries no gradient; what is chosen is read by the attention itself, with
the same queries and keys, and that trains it.
"""

from typing import NamedTuple

import torch

from adaptive_longformer.attention.cuda_graphs import OUTSIDE_OF_GRAPHS
from adaptive_longformer.attention.global_keys import GlobalKeys, global_keys
from adaptive_longformer.attention.kernels.triton_device import why_no_triton
from adaptive_longformer.attention.padding import ordinary_tokens
from adaptive_longformer.patterns.sliding_window import SlidingWindow
from adaptive_longformer.selection.exact import covered_blocks, exact_choice
from adaptive_longformer.selection.exact_call import ExactCall
from adaptive_longformer.selection.means import run_means
from adaptive_longformer.selection.options import SelectionCall, SelectionOptions
from adaptive_longformer.selection.sampling import NO_SEED


class SelectedBlocks(NamedTuple):
    """What the blocks of queries chose, best first.

    Attributes:
        key_blocks: int32 [batch, heads, query_blocks, num_blocks]; 0 beyond the count.
        counts: int32 [batch, heads, query_blocks].
        mass: float, shape of key_blocks: the mass of each; 0 beyond the count.
        covered: float [batch, heads, query_blocks], the mass of what is read anyway: blocks that
            the window covers, and global tokens.
        global_blocks: int32 [batch, heads, num_global_blocks], chosen for the whole row.
        global_open: bool [batch, heads, query_blocks, num_global_blocks], whether a query block
            reads it through the list (False where the window covers it or the row has no such
            block).
        global_means: float [batch, heads, num_global_blocks, head_dim], the mean key of each.
        log_weights: float, shape of key_blocks: what is added to the scores of each, 0 beyond the
            count, where blocks are drawn by chance; else None.
    """

    key_blocks: torch.Tensor
    counts: torch.Tensor
    mass: torch.Tensor
    covered: torch.Tensor
    global_blocks: torch.Tensor
    global_open: torch.Tensor
    global_means: torch.Tensor
    log_weights: torch.Tensor | None = None

    def of_last_row(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Key blocks, counts and log_weights of the last query block."""
        weights = None if self.log_weights is None else self.log_weights[:, :, -1]
        return self.key_blocks[:, :, -1], self.counts[:, :, -1], weights


@torch.no_grad()
def select_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    window: SlidingWindow,
    options: SelectionOptions,
    *,
    attention_mask: torch.Tensor | None = None,
    global_mask: torch.Tensor | GlobalKeys | None = None,
    max_global_tokens: int | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    global_directions: torch.Tensor | None = None,
    means: tuple[torch.Tensor, torch.Tensor] | None = None,
    validate: bool = False,
) -> SelectedBlocks:
    """Chooses for every query block the key blocks with the largest mass.

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
        global_mask: bool [batch, length]: global tokens, which neither vote nor are chosen. Or
            `GlobalKeys`, packed once for many calls.
        max_global_tokens: at most this many tokens of a sequence are global, the first ones. On a
            GPU nothing is then read back from it, which CUDA graphs need. None: no limit.
        is_causal: a block is chosen only if it ends before the query block begins, and by the
            queries of the query block before.
        scale: factor of the scores; None: head_dim**-0.5.
        global_directions: [heads, head_dim]; with `num_global_blocks` the blocks with the largest
            direction . mean key + log count are chosen for all query blocks of a row.
        means: of keys, as `ExactCall` takes them, with is_causal; None: they are computed.
        validate: raise on keys or queries that are not finite, which waits for the device.

    Raises:
        ValueError: `validate`, and a real token's query or key is NaN or infinite (without
            `validate` such query blocks choose nothing); or query and key do not fit together.
    """
    _check_call(query, key, options, is_causal)
    if validate:
        _check_finite(query, key, attention_mask)
    assert window.right is not None
    factor = query.shape[3] ** -0.5 if scale is None else scale
    keys = global_mask if isinstance(global_mask, GlobalKeys) else (global_mask, None)
    call = SelectionCall(options, window.left, window.right, is_causal, factor, max_global_tokens)
    is_known = keys[0] is None or keys[1] is not None or max_global_tokens is not None
    *found, log_weights = (_in_graphs if is_known else selection_operator)(
        query, key, attention_mask, *keys, global_directions,
        *((None, None) if means is None else means), call.numbers(), call.scale,
    )  # fmt: skip
    selected = SelectedBlocks(*found)
    if options.sampling_seed == NO_SEED:
        return selected
    return selected._replace(log_weights=log_weights)


def _check_call(
    query: torch.Tensor, key: torch.Tensor, options: SelectionOptions, is_causal: bool
) -> None:
    if options.num_global_blocks and is_causal:
        raise ValueError(
            f"num_global_blocks is {options.num_global_blocks}, 0 is needed with is_causal: "
            "which blocks a whole row reads would tell earlier tokens about later ones"
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


def _select(
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    global_mask: torch.Tensor | None,
    global_positions: torch.Tensor | None,
    global_directions: torch.Tensor | None,
    means: torch.Tensor | None,
    mean_counts: torch.Tensor | None,
    numbers: list[int],
    scale: float,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor,
    torch.Tensor, torch.Tensor,
]:  # fmt: skip
    """`select_blocks` as one operator, whose inside torch.compile need not see."""
    call = SelectionCall.from_numbers(numbers, scale)
    options, length = call.options, key.shape[2]
    for_all = _nothing_for_all(query, options)
    members, ends, positions = choice_masks(
        attention_mask, global_mask, call.max_global_tokens, global_positions
    )
    shared = None
    with torch.autocast(query.device.type, enabled=False):
        if options.num_global_blocks:
            shared = _choose_for_all(key, members, global_directions, options.block_size, for_all)
        exact = ExactCall(
            query,
            key,
            length,
            call.left,
            call.right,
            options.num_blocks,
            options.block_size,
            options.query_block_size,
            voters=members,
            key_counts=members,
            ends=ends,
            global_positions=positions,
            is_causal=call.is_causal,
            scale=call.scale,
            shared_blocks=shared,
            sampling_seed=options.sampling_seed,
            means=None if means is None or mean_counts is None else (means, mean_counts),
        )
        if shared is not None:
            first, last = covered_blocks(exact)
            is_far = (shared[:, :, None] < first) | (shared[:, :, None] > last)
            for_all[1].copy_(is_far & (shared >= 0)[:, :, None])
        choice = exact_choice(exact, options.num_candidates)
    chosen = choice.key_blocks, choice.counts, choice.mass, choice.covered
    return *chosen, *for_all, choice.log_weights


def choice_masks(
    attention_mask: torch.Tensor | None,
    global_mask: torch.Tensor | None,
    max_global_tokens: int | None,
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The tokens that are neither padding nor global, bool [batch, length]; and `ends` and
    `global_positions` of an `ExactCall`, which are given where the mask is packed already.
    """
    if positions is not None and positions.shape[1] == 0:
        global_mask = positions = None
    mask = attention_mask if global_mask is None else global_mask
    if mask is None:
        return None, None, None
    if positions is not None:
        max_global_tokens = positions.shape[1]
    is_known = global_mask is None or max_global_tokens is not None
    if is_known and why_no_triton(mask.device) is None:
        from adaptive_longformer.selection.triton_inputs import triton_masks

        return triton_masks(attention_mask, global_mask, max_global_tokens or 0)
    ends = None
    if attention_mask is not None:
        slot = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        ends = (attention_mask * slot).amax(dim=1)
    if global_mask is not None and positions is None:
        keys = global_keys(global_mask, attention_mask, max_global_tokens)
        global_mask, positions = keys.mask, keys.packed()
    return ordinary_tokens(attention_mask, global_mask), ends, positions


def _fake_selection(
    query, key, attention_mask, global_mask, global_positions, global_directions, means,
    mean_counts, numbers, scale,
):  # fmt: skip
    options = SelectionCall.from_numbers(numbers, scale).options
    shape = (*query.shape[:2], -(-query.shape[2] // options.query_block_size))
    dtype = torch.promote_types(query.dtype, torch.float32)
    return (
        query.new_empty(*shape, options.num_blocks, dtype=torch.int32),
        query.new_empty(shape, dtype=torch.int32),
        query.new_empty(*shape, options.num_blocks, dtype=dtype),
        query.new_empty(shape, dtype=dtype),
        *_nothing_for_all(query, options),
        query.new_empty(
            *shape[:2],
            0 if options.sampling_seed == NO_SEED else shape[2],
            options.num_blocks,
            dtype=dtype,
        ),
    )


# The number of global tokens is read back from the device where nothing limits it.
selection_operator, _in_graphs = (
    torch.library.custom_op(f"adaptive_longformer::{name}", _select, mutates_args=(), tags=tags)
    for name, tags in (("select_blocks", OUTSIDE_OF_GRAPHS), ("select_blocks_in_graphs", ()))
)
selection_operator.register_fake(_fake_selection)
_in_graphs.register_fake(_fake_selection)


def _nothing_for_all(
    query: torch.Tensor, options: SelectionOptions
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """global_blocks, global_open and global_means of `SelectedBlocks` without any."""
    batch, heads, length, head_dim = query.shape
    rows, num_blocks = -(-length // options.query_block_size), options.num_global_blocks
    dtype = torch.promote_types(query.dtype, torch.float32)
    return (
        query.new_zeros(batch, heads, num_blocks, dtype=torch.int32),
        query.new_zeros(batch, heads, rows, num_blocks, dtype=torch.bool),
        query.new_zeros(batch, heads, num_blocks, head_dim, dtype=dtype),
    )


def _choose_for_all(
    key: torch.Tensor,
    members: torch.Tensor | None,
    directions: torch.Tensor | None,
    block_size: int,
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """The blocks that all query blocks of a row read, by direction . mean + log count: int64
    [batch, heads, num_global_blocks], -1 where there is none. Writes them into `global_blocks` and
    `global_means`, the first and last of the result.
    """
    global_blocks, _, global_means = result
    batch, heads, wanted = global_blocks.shape
    means, counts = run_means(key, members, block_size)
    means = means.repeat_interleave(heads // key.shape[1], dim=1)  # [batch, heads, blocks, d]
    log_counts = counts.log()[:, None]
    scores = log_counts.expand(batch, heads, -1)
    if directions is not None:
        scores = (means @ directions.to(means.dtype)[:, :, None])[..., 0] + log_counts
    scores = scores.masked_fill(scores.isnan(), -torch.inf)
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :wanted]
    is_block = scores.gather(-1, order) > -torch.inf
    found = order.shape[-1]
    global_blocks[..., :found] = order.where(is_block, 0)
    global_means[:, :, :found] = means.take_along_dim(order[..., None], dim=2)
    shared = torch.full_like(global_blocks, -1, dtype=torch.int64)
    shared[..., :found] = order.where(is_block, -1)
    return shared
