"""Selection and the attention to what it chose, in plain tensor operations for torch.export and
ONNX, as attention/backends/exportable.py is for windows.

A loop over chunks of queries, of which a graph has one copy. A chunk meets all keys: the scores
say which blocks have the largest mass, as in selection/exact.py, and are those of the attention
where a block is read. O(length^2) time, O(length) memory.

It chooses in float32, or float64 for tensors in it, takes it that all numbers are finite, and draws
no blocks by chance.
"""

import math
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch.nn import functional as F

from adaptive_longformer.attention.backends.exportable import (
    packed_global_keys,
    with_global_rows,
)
from adaptive_longformer.attention.call import AttentionCall, AttentionSpan
from adaptive_longformer.attention.padding import ordinary_tokens, readable
from adaptive_longformer.attention.reference import span_log_weight
from adaptive_longformer.patterns.sliding_window import SlidingWindow
from adaptive_longformer.selection.exact import (
    ALL_PER_CANDIDATE,
    MEANS_PER_MEAN,
    TOKENS_PER_MEAN,
    covered_range,
)
from adaptive_longformer.selection.exact_call import ExactCall
from adaptive_longformer.selection.options import SelectionOptions
from adaptive_longformer.selection.repeated_positions import without_positions
from adaptive_longformer.selection.sampling import NO_SEED


class BlockBias(NamedTuple):
    """What is added to the scores of chosen blocks; -inf: they are not read.

    Attributes:
        ranks: [heads, num_blocks], of a query block's best, second best, ... block.
        directions, shared: [heads, head_dim] and [heads], which choose `num_global_blocks` for all
            query blocks, and what is added beside direction . mean key; None: there are none.
    """

    ranks: torch.Tensor
    directions: torch.Tensor | None = None
    shared: torch.Tensor | None = None


def longest_exportable(options: SelectionOptions) -> int:
    """How many tokens a document may have: for more, `exact_choice` has more than two stages."""
    means = math.lcm(MEANS_PER_MEAN, _place_size(options) // TOKENS_PER_MEAN)
    return ALL_PER_CANDIDATE * -(-options.num_candidates // means) * means * TOKENS_PER_MEAN


def _place_size(options: SelectionOptions) -> int:
    """Tokens of a place, of which the coarser stage keeps some."""
    return math.lcm(TOKENS_PER_MEAN, options.block_size)


def selecting_attention(
    call: AttentionCall,
    options: SelectionOptions,
    bias: BlockBias,
    repeated_length: int | None = None,
) -> torch.Tensor:
    """Output [batch, heads, length, head_dim] of a layer that selects; the call's pattern is the
    window, which is read anyway. In longer documents than `repeated_length` the choice sees keys
    as `without_positions` leaves them.
    """
    # Imported only here: it takes time, and is not the same in every torch.
    from torch._higher_order_ops.scan import scan_op

    if options.sampling_seed != NO_SEED:
        raise ValueError("selection_sampling is True, False is needed to export a model")
    chunks = _Chunks(call, options, bias, repeated_length)
    nothing = call.query.new_zeros(1)  # is carried from chunk to chunk, as something has to be
    _, output = scan_op(
        chunks.step, [nothing], [*chunks.steps.values()], (*chunks.common.values(),)
    )
    token = torch.arange(call.query.shape[2], device=output.device)
    output = output[token // chunks.size, :, :, token % chunks.size]
    output = output.permute(1, 2, 0, 3).to(call.query.dtype)
    return output if call.global_keys is None else with_global_rows(output, call)


class _Chunks:
    """The tensors of a loop: `steps` [chunks, ...], of one chunk at a time, and `common` ones.

    Keys and values are [batch, heads, tokens of a block, blocks, head_dim] and scores end with
    [tokens of a block, blocks]: a number that is not known is divided by none then. For the same
    reason there is one chunk and one block more than are needed: nothing asks whether there is
    more than one.
    """

    def __init__(
        self,
        call: AttentionCall,
        options: SelectionOptions,
        bias: BlockBias,
        repeated_length: int | None,
    ) -> None:
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        self.call, self.options = call, options
        self.rows = -(-64 // options.query_block_size)  # a step takes 64 queries at least
        self.size = self.rows * options.query_block_size
        length, device = call.query.shape[2], call.query.device
        dtype = torch.promote_types(call.query.dtype, torch.float32)
        tensors = readable(call.query, call.key, call.value, call.attention_mask)
        query, key, value = (tensor.to(dtype) for tensor in tensors)
        is_member = ordinary_tokens(call.attention_mask, call.global_mask)
        if is_member is None:
            is_member = torch.ones_like(query[:, 0, :, 0], dtype=torch.bool)
        is_member = is_member[:, None, :, None].to(dtype)
        chunk = torch.arange(length // self.size + 2, device=device)
        slot = chunk[:, None] * self.size + torch.arange(self.size, device=device)
        row = chunk[:, None] * self.rows + torch.arange(self.rows, device=device)
        first, last = self._covered(row, options.query_block_size, options.block_size)
        self.steps = {
            "slot": slot,
            "query": _picked(query * call.scale, slot, self.size).permute(2, 0, 1, 3, 4),
            "is_voter": _picked(is_member, slot, self.size)[:, 0, ..., 0].transpose(0, 1),
            "first": first,
            "last": last,
        }
        token = _tokens(length, options.block_size, device)
        self.common = {
            "token": token,
            "key": _picked(key, token, options.block_size),
            "value": _picked(value, token, options.block_size),
            "log_count": _picked(is_member, token, options.block_size)[..., 0].log(),
            "rank_bias": bias.ranks.to(dtype),
        }
        self.common |= self._global_tokens(key, value)
        self.is_repeated, choice_key = repeated_length is not None, key
        if repeated_length is not None:
            is_valid = torch.ones_like(key[:, :1, :, :1], dtype=torch.bool)
            if call.attention_mask is not None:
                is_valid = call.attention_mask[:, None, :, None]
            choice_key = without_positions(key, is_valid, repeated_length)
            self.common |= {
                "choice_key": _picked(choice_key, token, options.block_size),
                "choice_global_key": self._global_tokens(choice_key, value)["global_key"],
            }
        if call.span is not None:
            self.common["span"] = call.span.length
        if bias.directions is not None and bias.shared is not None:
            self.common |= self._blocks_for_all(bias.directions.to(dtype), bias.shared.to(dtype))
        place = _place_size(options)
        kept = -(-options.num_candidates // place)
        self.longest_short = ALL_PER_CANDIDATE * kept * place
        self.num_places = 0 if statically_known_true(length <= self.longest_short) else kept
        if self.num_places:
            self._add_places(choice_key, is_member, row)

    def _ends(self) -> torch.Tensor:
        """One more than the last token that is not padding: int64 [batch, 1, 1]."""
        slot = torch.arange(1, self.call.query.shape[2] + 1, device=self.call.query.device)
        if self.call.attention_mask is None:
            return slot[-1:].expand(self.call.query.shape[0])[:, None, None]
        return (slot * self.call.attention_mask).amax(dim=1)[:, None, None]

    def _covered(
        self, numbers: torch.Tensor, query_block_size: int, block_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The first and last block that the window covers for query blocks by their numbers
        [chunks, rows], each [chunks, batch, rows].
        """
        query, key = self.call.query, self.call.key
        window, length = _window(self.call), self.call.query.shape[2]
        exact = ExactCall(
            query, key, length, window.left, window.right, 1, block_size, query_block_size
        )
        first, last = covered_range(exact, numbers, self._ends())
        return first.transpose(0, 1), last.transpose(0, 1)

    def _global_tokens(self, key: torch.Tensor, value: torch.Tensor) -> dict[str, torch.Tensor]:
        """Their keys, values, and 0 for each that there is, or -inf."""
        keys = self.call.global_keys
        if keys is None or keys.packed().shape[1] == 0:
            nothing = torch.zeros_like(key[:, :, :1])
            missing = torch.full_like(key[:, :1, :1, :1], -torch.inf)
            return {"global_key": nothing, "global_value": nothing, "global_log": missing}
        global_key, global_value, is_used = packed_global_keys(key, value, keys)
        log_used = is_used.to(key.dtype).log()
        return {"global_key": global_key, "global_value": global_value, "global_log": log_used}

    def _blocks_for_all(
        self, directions: torch.Tensor, shared_bias: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The blocks that learned directions choose [batch, heads, num_global_blocks], and what is
        added to their scores.
        """
        wanted = self.options.num_global_blocks
        is_member = self.common["log_count"].exp()  # [batch, 1, tokens of a block, blocks]
        counts = is_member.sum(dim=2)  # [batch, 1, blocks]
        key = self.common["choice_key" if self.is_repeated else "key"]
        means = (key * is_member[..., None]).sum(dim=2)
        means = means / counts.clamp(min=1.0)[..., None]
        fit = (means * directions[:, None]).sum(dim=-1)  # [batch, heads, blocks]
        best, order = F.pad(fit + counts.log(), (0, wanted), value=-torch.inf).topk(wanted)
        shared_bias = F.pad(fit, (0, wanted)).gather(-1, order) + shared_bias[:, None]
        return {
            "shared": order,
            "shared_bias": shared_bias.masked_fill(best == -torch.inf, -torch.inf),
        }

    def _add_places(self, key: torch.Tensor, is_member: torch.Tensor, row: torch.Tensor) -> None:
        """What the coarser stage needs: means of runs of keys, and what the window covers."""
        length, place = self.call.query.shape[2], _place_size(self.options)
        runs = _tokens(length, place, key.device).unflatten(0, (-1, TOKENS_PER_MEAN))
        # [batch, 1, means of a place, tokens of a mean, places, 1]
        is_member = _picked(is_member, runs, place)
        counts = is_member.sum(dim=3)
        means = (_picked(key, runs, place) * is_member).sum(dim=3) / counts.clamp(min=1.0)
        self.common |= {"mean": means, "log_mean_count": counts[..., 0].log()}
        self.common["is_short"] = self._ends()[:, :, :, None] <= self.longest_short
        first, last = self._covered(row, self.options.query_block_size, place)
        self.steps |= {"first_place": first, "last_place": last}

    def step(self, carry: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """The carried tensor, and the output of one chunk [batch, heads, queries, head_dim]."""
        given = SimpleNamespace(**dict(zip([*self.steps, *self.common], tensors, strict=True)))
        scores = _scores(given.query, given.key, given.log_count)
        of_globals = given.query @ given.global_key.mT + given.global_log
        seen = scores, of_globals  # by the choice
        if self.is_repeated:
            of_choice = _scores(given.query, given.choice_key, given.log_count)
            seen = of_choice, given.query @ given.choice_global_key.mT + given.global_log
        bias = self._block_bias(given, *seen)[:, :, :, None]
        offset = given.token - given.slot[:, None, None]
        window = _window(self.call)
        in_window = (offset >= -window.left) & (offset <= window.right)
        near = torch.zeros_like(bias[:1, :1, :1, :, :1])
        if self.call.span is not None:
            span = AttentionSpan(given.span, self.call.span.ramp)
            distance = offset.abs().flatten(1)
            near = span_log_weight(span, distance).unflatten(2, (len(given.token), -1))
        weights, of_globals, _ = _weights(scores + torch.where(in_window, near, bias), of_globals)
        total = weights.sum(dim=(3, 4)) + of_globals.sum(dim=-1)
        output = weights.flatten(3) @ given.value.flatten(2, 3) + of_globals @ given.global_value
        return [carry.clone(), output / total[..., None].clamp(min=torch.finfo(total.dtype).tiny)]

    def _block_bias(
        self, given: SimpleNamespace, scores: torch.Tensor, of_globals: torch.Tensor
    ) -> torch.Tensor:
        """What is added outside of the window [batch, heads, queries, blocks]; -inf where a block
        is not read.
        """
        block = torch.arange(scores.shape[-1], device=scores.device)
        is_near = is_covered = _between(block, given.first, given.last)
        if "shared" in self.common:
            is_shared = (given.shared[..., None] == block).any(dim=2)
            is_covered = is_near | is_shared[:, :, None]
        log_rest = None
        if self.num_places:
            is_candidate, log_rest = self._candidates(given, of_globals, block)
            is_candidate = self._of_queries(is_candidate)
            scores = scores.masked_fill(~is_candidate[:, :, :, None], -torch.inf)
        masses, _, _ = _masses(scores, of_globals, given.is_voter, is_covered, log_rest)
        mass, order = _best(masses, given.rank_bias.shape[1])
        bias = given.rank_bias[:, None].where(mass > 0, -torch.inf)
        bias = _spread(bias, order, masses, -torch.inf)
        if "shared" in self.common:
            order, of_all = (
                tensor[:, :, None].expand(-1, -1, self.rows, -1)
                for tensor in (given.shared, given.shared_bias)
            )
            of_all = _spread(of_all, order, masses, -torch.inf).masked_fill(is_near, -torch.inf)
            bias = torch.maximum(bias, of_all)
        return self._of_queries(bias)

    def _of_queries(self, of_rows: torch.Tensor) -> torch.Tensor:
        """What query blocks have, for each of their queries: [batch, heads, queries, ...]."""
        query = torch.arange(self.size, device=of_rows.device)
        return of_rows.index_select(2, query // self.options.query_block_size)

    def _candidates(
        self, given: SimpleNamespace, of_globals: torch.Tensor, block: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Which blocks the coarser stage leaves, bool [batch, heads, query blocks, blocks], and the
        logarithm of the mass that it drops [batch, heads, queries], -inf where it is not needed.
        """
        scores = _scores(given.query, given.mean, given.log_mean_count)
        place = torch.arange(scores.shape[-1], device=block.device)
        is_covered = _between(place, given.first_place, given.last_place)
        masses, sums, peak = _masses(scores, of_globals, given.is_voter, is_covered)
        mass, order = _best(masses, self.num_places)
        is_chosen = _spread((mass > 0).to(masses.dtype), order, masses, 0.0) > 0
        is_kept = self._of_queries(is_chosen | is_covered)
        dropped = (sums * ~is_kept).sum(dim=-1).log() + peak
        is_unused = given.is_short[..., 0] | (given.is_voter == 0)[:, None]
        width = _place_size(self.options) // self.options.block_size
        is_candidate = is_chosen.index_select(3, block // width) | given.is_short
        is_candidate = is_candidate | _between(block, given.first, given.last)
        return is_candidate, dropped.masked_fill(is_unused, -torch.inf)


def _window(call: AttentionCall) -> SlidingWindow:
    assert isinstance(call.pattern, SlidingWindow) and call.pattern.right is not None
    return call.pattern


def _tokens(length: int, size: int, device: torch.device) -> torch.Tensor:
    """Tokens of blocks, int64 [size, blocks]."""
    block = torch.arange(length // size + 2, device=device)
    return torch.arange(size, device=device)[:, None] + size * block


def _picked(tensor: torch.Tensor, index: torch.Tensor, size: int) -> torch.Tensor:
    """[batch, heads or 1, length, width] -> [batch, heads or 1, *index.shape, width], zeros behind
    the last token, where up to twice the size is asked for.
    """
    return F.pad(tensor, (0, 0, 0, 2 * size))[:, :, index].contiguous()


def _scores(query: torch.Tensor, key: torch.Tensor, log_count: torch.Tensor) -> torch.Tensor:
    """[batch, heads, queries, keys of a block, blocks]"""
    scores = query @ key.flatten(2, 3).mT
    return scores.unflatten(3, (key.shape[2], -1)) + log_count[:, :, None]


def _between(number: torch.Tensor, first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Which blocks are between bounds [batch, query blocks]: [batch, 1, query blocks, blocks]."""
    return ((number >= first[..., None]) & (number <= last[..., None]))[:, None]


def _weights(
    scores: torch.Tensor, of_globals: torch.Tensor, log_rest: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """exp of both, without a factor whose logarithm is the third result [batch, heads, queries]."""
    peak = torch.maximum(scores.amax(dim=(3, 4)), of_globals.amax(dim=-1))
    if log_rest is not None:
        peak = torch.maximum(peak, log_rest)
    peak = peak.clamp(min=torch.finfo(peak.dtype).min)
    return (scores - peak[..., None, None]).exp(), (of_globals - peak[..., None]).exp(), peak


def _masses(
    scores: torch.Tensor,
    of_globals: torch.Tensor,
    is_voter: torch.Tensor,
    is_covered: torch.Tensor,
    log_rest: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The mass of every block for every query block [batch, heads, query blocks, blocks], 0 where
    it is covered; the sums of exp over blocks [batch, heads, queries, blocks], and the logarithm of
    the factor that they lack.
    """
    weights, of_globals, peak = _weights(scores, of_globals, log_rest)
    sums = weights.sum(dim=3)
    total = sums.sum(dim=-1) + of_globals.sum(dim=-1)
    if log_rest is not None:
        total = total + (log_rest - peak).exp()
    by_row = (is_covered.shape[2], -1)
    voters = is_voter.unflatten(1, by_row)
    voters = (voters / voters.sum(dim=-1, keepdim=True).clamp(min=1.0)).flatten(1)[:, None]
    factor = voters / total.clamp(min=torch.finfo(total.dtype).tiny)
    masses = (factor[..., None] * sums).unflatten(2, by_row).sum(dim=3)
    return masses.masked_fill(is_covered, 0.0), sums, peak


def _best(masses: torch.Tensor, num_blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest masses and their blocks; blocks without mass, or that do not exist, fill up."""
    mass, order = F.pad(masses, (0, num_blocks)).topk(num_blocks)
    return mass, order


def _spread(
    values: torch.Tensor, order: torch.Tensor, like: torch.Tensor, filler: float
) -> torch.Tensor:
    """Values of blocks by their numbers [batch, heads, query blocks, any] in the shape of `like`,
    [..., blocks].
    """
    filled = F.pad(torch.full_like(like, filler), (0, order.shape[-1]), value=filler)
    block = torch.arange(like.shape[-1], device=like.device)
    return filled.scatter(-1, order, values).index_select(-1, block)
