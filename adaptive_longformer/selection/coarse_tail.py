"""The coarse tail: what no list names is read as one summary key per run of blocks.

A list of a block of queries names the blocks that its window touches and those it chose. The rest
of the sequence is cut into nodes of the key pyramid, as large as the level that a search starts
from allows: of that level all nodes without a named block, and of the others, level by level down
to blocks, the children without one. Every key outside of the named blocks that is neither padding
nor global is in exactly one node. A node v is read as one key and one value,

    score = q . (mean key of v) + log(number of keys in v) + log weight,    value = mean value of v,

in one softmax with everything else. What a named block of the window holds outside of a query's
window stays unread.
"""

from itertools import accumulate
from typing import NamedTuple

import torch
from torch.nn import functional as F

from adaptive_longformer.attention.autocast import without_autocast
from adaptive_longformer.attention.dropout import column_keys, keep_words, row_keys
from adaptive_longformer.attention.padding import ordinary_tokens, readable
from adaptive_longformer.patterns.block_layout import window_entries
from adaptive_longformer.patterns.sliding_window import SlidingWindow
from adaptive_longformer.selection.pyramid import FAN_OUT, key_pyramid
from adaptive_longformer.selection.select_blocks import RoutingOptions, SelectedBlocks

# Scores in memory at a time, by device.
_CHUNK_SCORES = {"cpu": 2**20, "cuda": 2**25}
_NO_BLOCK = 2**40


class CoarseTail(NamedTuple):
    """What a layer reads coarsely.

    Attributes:
        nodes: int64 [batch, heads, query_blocks, width], ids of nodes: those of the blocks first,
            then level by level those above; `num_nodes` is filling.
        head_bias: float [heads], what is added to the scores, -inf for a head without a tail.
        block_size, query_block_size: in tokens.
        num_levels: levels of nodes, blocks included.
    """

    nodes: torch.Tensor
    head_bias: torch.Tensor
    block_size: int
    query_block_size: int
    num_levels: int


class Summaries(NamedTuple):
    """The nodes of all levels behind each other.

    Attributes:
        key, value: [batch, heads, nodes, head_dim], means.
        log_counts: [batch or 1, nodes], -inf for a node without keys.
    """

    key: torch.Tensor
    value: torch.Tensor
    log_counts: torch.Tensor


def nodes_per_level(length: int, block_size: int, num_levels: int) -> list[int]:
    """How many nodes the levels have, blocks first."""
    return [-(-length // (block_size * FAN_OUT**level)) for level in range(num_levels)]


@torch.no_grad()
def coarse_tail_nodes(
    selected: SelectedBlocks,
    window: SlidingWindow,
    length: int,
    options: RoutingOptions,
    *,
    rank_limit: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The nodes that cover what the lists of `selection_layout` do not name.

    Args:
        selected, window, length, options, rank_limit: as in `selection_layout`.
        attention_mask: bool [batch, length]; the level that the search starts from is that of a
            sequence's own length.

    Returns:
        int64 [batch, heads, query_blocks, width], see `CoarseTail.nodes`: O(length) memory.
    """
    named = _named_blocks(selected, window, length, options, rank_limit)
    device, size = named.device, options.block_size
    num_levels = options.start_level(-(-length // size))
    counts = nodes_per_level(length, size, num_levels)
    offsets = torch.tensor([0, *accumulate(counts)], device=device)
    filling = sum(counts)
    start = _start_levels(length, options, num_levels, attention_mask, device)[:, None, None, None]
    node = torch.arange(min(options.start_nodes, counts[0]), device=device)
    node = node.expand(*named.shape[:3], -1).contiguous()
    limits = torch.tensor(counts, device=device)
    pieces = []
    for step in range(num_levels):
        level = start - step  # of every sequence's own; below 0 there is nothing left
        above = named >> 2 * level.clamp(min=0)  # nodes that hold a named block, ascending
        place = torch.searchsorted(above, node).clamp(max=above.shape[-1] - 1)
        is_named = above.gather(-1, place) == node
        is_node = (level >= 0) & (node < limits[level.clamp(min=0)])
        ids = offsets[level.clamp(min=0)] + node
        pieces.append(ids.where(is_node & ~is_named, filling))
        if step + 1 < num_levels:
            is_first = F.pad(above[..., 1:] != above[..., :-1], (1, 0), value=True)
            opened = above.where(is_first, _NO_BLOCK)[..., None]
            node = (opened * FAN_OUT + torch.arange(FAN_OUT, device=device)).flatten(-2)
    return torch.cat(pieces, dim=-1)


def summaries(
    key: torch.Tensor,
    value: torch.Tensor,
    members: torch.Tensor | None,
    block_size: int,
    num_levels: int,
) -> Summaries:
    """Mean keys and values of all nodes, with gradients of both: O(length) memory.

    Args:
        key, value: [batch, heads, length, head_dim].
        members: bool [batch, length], the tokens that count; None: all.
        block_size, num_levels: as in `CoarseTail`.
    """
    counts = nodes_per_level(key.shape[2], block_size, num_levels)
    of_key = key_pyramid(key, members, block_size, num_levels)
    of_value = key_pyramid(value, members, block_size, num_levels)
    return Summaries(
        torch.cat([m[:, :, :count] for m, count in zip(of_key.means, counts)], dim=2),
        torch.cat([m[:, :, :count] for m, count in zip(of_value.means, counts)], dim=2),
        torch.cat([c[:, :count] for c, count in zip(of_key.log_counts, counts)], dim=1),
    )


def add_coarse_tail(
    output: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tail: CoarseTail,
    *,
    attention_mask: torch.Tensor | None = None,
    global_mask: torch.Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Joins the tail to attention that is already computed, as in one softmax over both.

    Args:
        output, lse: what `sparse_attention` returned with return_lse.
        query, key, value: [batch, heads, length, head_dim], what it was called with.
        tail: what else is read. Global queries, which read every token, do without.
        attention_mask, global_mask, scale, dropout_p, dropout_seed: what it was called with; global
            tokens are in no node.

    Returns:
        The output [batch, heads, length, head_dim], and the share of the tail in the softmax,
        [batch, heads, length].
    """
    query, key, value = readable(query, key, value, attention_mask)
    means = summaries(
        key, value, ordinary_tokens(attention_mask, global_mask), tail.block_size, tail.num_levels
    )
    bias = means.log_counts[:, None] + tail.head_bias.to(means.log_counts.dtype)[:, None]
    tail_output, tail_lse = coarse_tail(
        query, means.key, means.value, bias.expand(means.key.shape[:3]), tail.nodes,
        tail.query_block_size, query.shape[3] ** -0.5 if scale is None else scale, dropout_p,
        dropout_seed,
    )  # fmt: skip
    if global_mask is not None:
        tail_lse = tail_lse.masked_fill(global_mask[:, None], -torch.inf)
    is_empty = tail_lse == -torch.inf
    # With nothing on both sides the difference is NaN.
    share = (tail_lse - lse).masked_fill(is_empty, -torch.inf).sigmoid()
    joined = output + share[..., None] * (tail_output - output)
    return joined.to(output.dtype), share


def coarse_tail_probabilities(
    query: torch.Tensor,
    key: torch.Tensor,
    tail: CoarseTail,
    *,
    attention_mask: torch.Tensor | None = None,
    global_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """The tail's softmax, the weight of a node spread evenly over its tokens: dense [batch, heads,
    length, length], for inspection. Rows sum to 1, or 0 without a tail.
    """
    query, key, _ = readable(query, key, key, attention_mask)
    batch, heads, length, head_dim = query.shape
    members = ordinary_tokens(attention_mask, global_mask)
    means = summaries(key, key, members, tail.block_size, tail.num_levels)
    bias = means.log_counts[:, None] + tail.head_bias.to(means.log_counts.dtype)[:, None]
    factor = head_dim**-0.5 if scale is None else scale
    scores = (query.to(means.key.dtype) * factor) @ means.key.mT + bias[:, :, None]
    is_read = scores.new_zeros(*tail.nodes.shape[:3], scores.shape[-1] + 1, dtype=torch.bool)
    is_read.scatter_(-1, tail.nodes, True)
    is_read = is_read[..., :-1].repeat_interleave(tail.query_block_size, dim=2)[:, :, :length]
    weights = scores.masked_fill(~is_read, -torch.inf).softmax(dim=-1).nan_to_num(0.0)
    weights = weights / means.log_counts[:, None, None].exp().clamp(min=1.0)  # per token
    counts = nodes_per_level(length, tail.block_size, tail.num_levels)
    dense = weights.new_zeros(batch, heads, length, length)
    for level, of_level in enumerate(weights.split(counts, dim=-1)):
        span = tail.block_size * FAN_OUT**level
        dense += of_level.repeat_interleave(span, dim=-1)[..., :length]
    return dense if members is None else dense * members[:, None, None]


def summary_keys(
    tail: CoarseTail,
    length: int,
    attention_mask: torch.Tensor | None = None,
    global_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """How many summary keys a query reads: int64 [batch, heads, query_blocks]."""
    token = torch.ones(tail.nodes.shape[0], 1, length, 1, device=tail.nodes.device)
    members = ordinary_tokens(attention_mask, global_mask)
    log_counts = summaries(token, token, members, tail.block_size, tail.num_levels).log_counts
    is_open = F.pad(log_counts > -torch.inf, (0, 1), value=False)
    is_open = is_open[:, None] & (tail.head_bias > -torch.inf)[:, None]  # [batch or 1, heads, ...]
    is_open = is_open.expand(*tail.nodes.shape[:2], -1)
    read = is_open.take_along_dim(tail.nodes.flatten(2), dim=2)
    return read.view(tail.nodes.shape).sum(dim=-1)


def _named_blocks(
    selected: SelectedBlocks,
    window: SlidingWindow,
    length: int,
    options: RoutingOptions,
    rank_limit: torch.Tensor | None,
) -> torch.Tensor:
    """The blocks that every query block's list names, those its window touches included: int64
    [batch, heads, query_blocks, entries], ascending, some twice, then filling.
    """
    batch, heads, rows, num_ranked = selected.key_blocks.shape
    device = selected.key_blocks.device
    near, flags = window_entries(
        window, length, options.query_block_size, options.block_size, device
    )
    near = near.long().where(flags != 0, _NO_BLOCK).expand(batch, heads, -1, -1)
    counts = selected.counts
    if rank_limit is not None:
        counts = torch.minimum(counts, rank_limit[:, None].to(counts.dtype))
    is_chosen = torch.arange(num_ranked, device=device) < counts[..., None]
    chosen = selected.key_blocks.long().where(is_chosen, _NO_BLOCK)
    shared = selected.global_blocks.long()[:, :, None].expand(-1, -1, rows, -1)
    shared = shared.where(selected.global_open, _NO_BLOCK)
    return torch.cat([near, chosen, shared], dim=-1).sort(dim=-1).values


def _start_levels(
    length: int,
    options: RoutingOptions,
    num_levels: int,
    attention_mask: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:
    """The level, 0 for blocks, that the search of every sequence starts from: int64 [batch or
    1].
    """
    own = torch.full((1,), length, device=device)
    if attention_mask is not None:
        slot = torch.arange(1, length + 1, device=device)
        own = (attention_mask * slot).amax(dim=1)
    level = torch.zeros_like(own)
    for below in range(num_levels - 1):
        span = options.block_size * FAN_OUT**below
        level += (own + span - 1) // span > options.start_nodes
    return level


class _Tables:
    """The summaries with one closed node behind them, of all batch rows and heads behind each
    other.
    """

    def __init__(self, query, key, value, bias, nodes, query_block_size, scale) -> None:
        self.batch, self.heads, self.length, self.head_dim = query.shape
        self.lead = self.batch * self.heads
        self.dtype, self.scale, self.size = key.dtype, scale, query_block_size
        self.rows, self.width = nodes.shape[2:]
        self.num_nodes = key.shape[2] + 1
        self.key, self.value = (F.pad(t, (0, 0, 0, 1)).flatten(0, 2) for t in (key, value))
        self.bias = F.pad(bias, (0, 1), value=-torch.inf).flatten()
        first = torch.arange(self.lead, device=nodes.device)[:, None, None] * self.num_nodes
        self.index = nodes.flatten(0, 1) + first  # [lead, query_blocks, width]
        self.filler = self.rows * self.size - self.length
        self.query = self.by_block(query) * scale

    def by_block(self, tensor: torch.Tensor) -> torch.Tensor:
        """[batch, heads, length, ...] -> [lead, query_blocks, size, ...], zeros behind the end."""
        if tensor.ndim == 3:
            return self.by_block(tensor[..., None])[..., 0]
        tensor = F.pad(tensor.to(self.dtype), (0, 0, 0, self.filler))
        return tensor.reshape(self.lead, self.rows, self.size, -1)

    def by_token(self, tensor: torch.Tensor) -> torch.Tensor:
        """The inverse of `by_block`."""
        tensor = tensor.reshape(self.batch, self.heads, self.rows * self.size, *tensor.shape[3:])
        return tensor[:, :, : self.length].contiguous()

    def chunks(self):
        """Runs of query blocks."""
        scores = self.lead * self.width * max(self.size, self.head_dim)
        step = max(1, _CHUNK_SCORES.get(self.key.device.type, 2**20) // max(scores, 1))
        for start in range(0, self.rows, step):
            yield slice(start, min(start + step, self.rows))

    def scores(self, chunk: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scores [blocks, size, width], and the index [blocks * width], keys and values [blocks,
        width, head_dim] of the nodes they are of.
        """
        index = self.index[:, chunk].flatten()
        key, value = (
            table.index_select(0, index).view(-1, self.width, self.head_dim)
            for table in (self.key, self.value)
        )
        query = self.query[:, chunk].flatten(0, 1)
        bias = self.bias.index_select(0, index).view(-1, 1, self.width)
        return torch.baddbmm(bias, query, key.mT), index, key, value

    def dropped(self, seed: torch.Tensor, dropout_p: float, chunk: slice) -> torch.Tensor:
        """What dropout makes of the weights of a chunk, [blocks, size, width]: 0, or what they are
        multiplied with. Nodes are columns behind those of the tokens.
        """
        rows = row_keys(seed, self.batch, self.heads, self.rows * self.size)
        rows = rows.view(self.lead, self.rows, self.size)[:, chunk].flatten(0, 1)
        columns = column_keys(seed, self.length + self.num_nodes)[self.length :]
        node = self.index[:, chunk].flatten(0, 1) % self.num_nodes
        keep = keep_words(rows[..., None], columns[node][:, None], dropout_p)
        return (keep != 0).to(self.dtype) / (1 - dropout_p)


@torch.library.custom_op("adaptive_longformer::coarse_tail", mutates_args=())
@without_autocast
def coarse_tail(
    query: torch.Tensor,
    summary_key: torch.Tensor,
    summary_value: torch.Tensor,
    bias: torch.Tensor,
    nodes: torch.Tensor,
    query_block_size: int,
    scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query block to its own list of summaries, in the summaries' type.

    Args:
        query: [batch, heads, length, head_dim].
        summary_key, summary_value: [batch, heads, nodes, head_dim].
        bias: [batch, heads, nodes], added to the scores; -inf: not read.
        nodes: int64 [batch, heads, query_blocks, width]; the number of nodes is filling.
        query_block_size, scale, dropout_p, dropout_seed: as in `add_coarse_tail`.

    Returns:
        Output [batch, heads, length, head_dim] and log-sum-exp [batch, heads, length]; 0 and -inf
        where nothing is read.
    """
    tables = _Tables(query, summary_key, summary_value, bias, nodes, query_block_size, scale)
    output = torch.empty_like(tables.query)
    lse = output.new_empty(output.shape[:3])
    for chunk in tables.chunks():
        weights, _, _, value = tables.scores(chunk)
        peak = weights.amax(dim=-1, keepdim=True).clamp_(min=torch.finfo(weights.dtype).min)
        weights.sub_(peak).exp_()
        total = weights.sum(dim=-1, keepdim=True)
        lse[:, chunk] = (peak + total.log()).view(lse[:, chunk].shape)
        if dropout_p > 0:
            assert dropout_seed is not None
            weights.mul_(tables.dropped(dropout_seed, dropout_p, chunk))
        result = torch.bmm(weights, value) / total.masked_fill_(total == 0, 1.0)
        output[:, chunk] = result.view(output[:, chunk].shape)
    return tables.by_token(output), tables.by_token(lse)


@coarse_tail.register_fake
def _(query, summary_key, *_):
    output = summary_key.new_empty(query.shape)
    return output, summary_key.new_empty(query.shape[:3])


@torch.library.custom_op("adaptive_longformer::coarse_tail_backward", mutates_args=())
@without_autocast
def _coarse_tail_backward(
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    summary_key: torch.Tensor,
    summary_value: torch.Tensor,
    bias: torch.Tensor,
    nodes: torch.Tensor,
    query_block_size: int,
    scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, summary_key, summary_value and bias."""
    tables = _Tables(query, summary_key, summary_value, bias, nodes, query_block_size, scale)
    grad_query = torch.zeros_like(tables.query)
    grad_key, grad_value = torch.zeros_like(tables.key), torch.zeros_like(tables.value)
    grad_bias = torch.zeros_like(tables.bias)
    delta = (grad_output * output).sum(dim=-1) - grad_lse
    grad_output, lse, delta = (tables.by_block(t) for t in (grad_output, lse, delta))
    lse = lse.masked_fill(lse == -torch.inf, 0.0)  # their weights come out as exp(-inf) = 0
    for chunk in tables.chunks():
        weights, index, key, value = tables.scores(chunk)
        weights.sub_(lse[:, chunk].flatten(0, 1)[..., None]).exp_()
        grad = grad_output[:, chunk].flatten(0, 1)
        grad_scores = torch.bmm(grad, value.mT)
        applied = weights
        if dropout_p > 0:
            assert dropout_seed is not None
            factor = tables.dropped(dropout_seed, dropout_p, chunk)
            grad_scores.mul_(factor)
            applied = weights * factor
        grad_value.index_add_(0, index, torch.bmm(applied.mT, grad).flatten(0, 1))
        grad_scores.sub_(delta[:, chunk].flatten(0, 1)[..., None]).mul_(weights)
        chunk_query = tables.query[:, chunk].flatten(0, 1)
        result = torch.bmm(grad_scores, key) * scale
        grad_query[:, chunk] = result.view(grad_query[:, chunk].shape)
        grad_key.index_add_(0, index, torch.bmm(grad_scores.mT, chunk_query).flatten(0, 1))
        grad_bias.index_add_(0, index, grad_scores.sum(dim=1).flatten())

    def of_nodes(grad: torch.Tensor) -> torch.Tensor:
        grad = grad.view(tables.batch, tables.heads, tables.num_nodes, *grad.shape[1:])
        return grad[:, :, :-1].contiguous()

    return (
        tables.by_token(grad_query).to(query.dtype), of_nodes(grad_key), of_nodes(grad_value),
        of_nodes(grad_bias),
    )  # fmt: skip


@_coarse_tail_backward.register_fake
def _(grad_output, grad_lse, output, lse, query, summary_key, summary_value, bias, *_):
    return tuple(
        tensor.new_empty(tensor.shape) for tensor in (query, summary_key, summary_value, bias)
    )


def _setup_context(ctx, inputs, output) -> None:
    *tensors, nodes, ctx.query_block_size, ctx.scale, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(*output, *tensors, nodes, seed)


def _backward(ctx, grad_output, grad_lse):
    *tensors, seed = ctx.saved_tensors
    grads = _coarse_tail_backward(
        grad_output, grad_lse, *tensors, ctx.query_block_size, ctx.scale, ctx.dropout_p, seed
    )
    return *grads, None, None, None, None, None


coarse_tail.register_autograd(_backward, setup_context=_setup_context)
