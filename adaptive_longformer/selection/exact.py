"""The exact stage of the selection: every query of a block meets every key of its candidates.

    p_ij = exp(scale q_i.k_j) / Z_i

where Z_i sums over the keys of the candidate blocks, of the blocks that the window covers, and over
global tokens; what a coarser stage dropped joins by its estimated mass. The mass of a block is the
mean, over the queries that vote, of the sum of its p_ij. Padding and global tokens are in no block.

Rows of at most twice `num_candidates` keys have all blocks as candidates. Longer ones go through
the same stage with means of 16 keys first, which keeps the blocks that have the largest mass; it
does so itself where the means are too many. That is O(length * num_candidates * log length) time
and O(length) memory: only the scores of a chunk of queries are in memory, and in C++
(csrc/cpu/select.cpp) and Triton (triton_select.py) none.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.nn import functional as F

from adaptive_longformer.attention.kernels.triton_device import why_no_triton
from adaptive_longformer.selection import sampling
from adaptive_longformer.selection.compiled_select import can_select, compiled_choice
from adaptive_longformer.selection.exact_call import ExactCall, ExactChoice, Places, empty_choice
from adaptive_longformer.selection.means import run_means

# Keys that a mean stands for, and means that a mean of a coarser stage still stands for: small
# ones of keys cost what more candidates cost, which find more.
TOKENS_PER_MEAN, MEANS_PER_MEAN = 16, 4
# Keys or means of a row whose queries meet all of them, at most, by the number of candidates.
ALL_PER_CANDIDATE = 2
# Scores in memory at a time, by device.
_CHUNK_SCORES = {"cpu": 2**21, "cuda": 2**27}


def exact_choice(call: ExactCall, num_candidates: int, with_dropped: bool = False) -> ExactChoice:
    """The blocks with the largest mass of every query block, or those that it draws in proportion
    to their mass, see sampling.py.

    A block with a key that is not finite is never chosen and counts nowhere; a query block with
    such a query among those that vote for it chooses nothing.

    Args:
        call: without places.
        num_candidates: about how many keys a query meets, those of the window aside; in rows that
            have no more than twice as many, all.
        with_dropped: whether to return `log_dropped`.
    """
    run = MEANS_PER_MEAN if call.tokens_per_key > 1 else TOKENS_PER_MEAN
    # The fewest blocks that means fill: where a place is larger, much that is near what is sought
    # takes the room of what is sought elsewhere.
    blocks_per_place = run // math.gcd(run, call.keys_per_block)
    num_places = max(1, -(-num_candidates // (blocks_per_place * call.keys_per_block)))
    most_blocks = ALL_PER_CANDIDATE * num_places * blocks_per_place
    if call.num_key_blocks > most_blocks:
        coarse = _coarser(call, run, blocks_per_place, num_places)
        kept = exact_choice(coarse, num_candidates, with_dropped=True)
        counts = _without_short_rows(call, kept.counts, most_blocks)
        short = most_blocks if call.is_causal or call.ends is not None else 0
        weights = kept.log_weights.exp() if call.num_drawn_rows else None
        places = Places(kept.key_blocks, counts, blocks_per_place, short, kept.log_dropped, weights)
        call = replace(call, places=places)
    if can_select(call):
        choice = compiled_choice(call, with_dropped=with_dropped)
    elif _is_in_triton(call):
        from adaptive_longformer.selection.triton_select import triton_choice

        choice = triton_choice(call, with_dropped=with_dropped)
    else:
        choice = torch_choice(call, with_dropped=with_dropped)
    return choice if call.sampling_seed == sampling.NO_SEED else _with_weights(call.places, choice)


def _with_weights(places: Places | None, choice: ExactChoice) -> ExactChoice:
    """The choice with `log_weights`, and masses without what places stand for."""
    weights = sampling.log_weights(choice.mass, choice.threshold)
    if places is None or places.weights is None:
        return choice._replace(log_weights=weights)
    of_place = _weights_of_places(places, choice.key_blocks)
    weights = (weights + of_place.log()).masked_fill(choice.mass <= 0, 0.0)
    return choice._replace(mass=choice.mass / of_place, log_weights=weights)


def _weights_of_places(places: Places, blocks: torch.Tensor, *at: slice | int) -> torch.Tensor:
    """The weights of the places that blocks are in, 1 of others: shape of `blocks`, which are those
    of the query blocks at an index into [batch, heads, query_blocks].
    """
    assert places.weights is not None
    numbers, weights = places.numbers[at], places.weights[at]
    slot = torch.arange(numbers.shape[-1], device=numbers.device)
    is_place = slot < places.counts[at][..., None]
    numbers, order = numbers.where(is_place, -1).sort(dim=-1)
    place = (blocks // places.blocks_per_place).to(numbers.dtype).contiguous()
    index = torch.searchsorted(numbers, place).clamp(max=len(slot) - 1)
    is_found = numbers.gather(-1, index) == place
    return weights.gather(-1, order).gather(-1, index).where(is_found, 1.0)


def _is_in_triton(call: ExactCall) -> bool:
    if why_no_triton(call.query.device) is not None:
        return False
    # Imported only here, as Triton takes a second and is not everywhere.
    from adaptive_longformer.selection.triton_select import can_choose

    return can_choose(call)


def covered_blocks(call: ExactCall) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and last block that the window covers for all queries of each query block: int64
    [batch or 1, 1, query_blocks, 1].
    """
    numbers = torch.arange(call.num_rows, device=call.query.device) + call.first_row
    ends = torch.full((1,), call.length, device=numbers.device) if call.ends is None else call.ends
    first, last = covered_range(call, numbers, ends[:, None])
    return first[:, None, :, None], last.expand_as(first)[:, None, :, None]


def covered_range(
    call: ExactCall, numbers: torch.Tensor, end: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of query blocks by their numbers, in sequences that end somewhere."""
    start = numbers * call.query_block_size
    last_query = start + call.query_block_size - 1
    if call.is_causal:
        last = start // call.block_size - 1
    else:
        last_query = torch.minimum(last_query, end - 1)
        reach = start + call.right
        last = ((reach + 1) // call.block_size - 1).where(reach < end - 1, call.num_key_blocks - 1)
    first = ((last_query - call.left).clamp(min=0) + call.block_size - 1) // call.block_size
    return first, last


def _without_short_rows(call: ExactCall, counts: torch.Tensor, most_blocks: int) -> torch.Tensor:
    """The counts of a coarser stage, -1 for query blocks for which there are at most so many blocks
    of the finer call, whatever comes behind, be it padding or later tokens.
    """
    if call.is_causal:
        limit = -(-(most_blocks + 1) * call.block_size // call.query_block_size)
        counts[:, :, : max(limit - call.first_row, 0)].fill_(-1)
        return counts
    if call.ends is None:
        return counts  # there was no coarser stage if all blocks were so few
    is_short = call.ends <= most_blocks * call.block_size
    return counts.masked_fill(is_short[:, None, None], -1)


def _coarser(call: ExactCall, run: int, blocks_per_place: int, num_places: int) -> ExactCall:
    """The call whose blocks are places and whose keys are means of `run` keys."""
    keys = call.num_sequence_keys
    if call.means is None:
        counts = None if call.key_counts is None else call.key_counts[:, :keys]
        if _is_in_triton(call):
            from adaptive_longformer.selection.triton_inputs import triton_means

            means, counts = triton_means(call.key[:, :, :keys], counts, run)
        else:
            means, counts = run_means(call.key[:, :, :keys], counts, run)
    else:
        means, counts = call.means
        # Whatever comes behind the last complete run is near.
        missing = -(-keys // run) - means.shape[2]
        means, counts = F.pad(means, (0, 0, 0, missing)), F.pad(counts, (0, missing))
    global_keys = None
    if call.global_positions is not None:
        index = call.global_positions if call.global_keys is None else call.global_keys
        picked = call.key.take_along_dim(
            index.clamp(max=call.key.shape[2] - 1)[:, None, :, None], dim=2
        )
        global_keys = torch.arange(index.shape[1], device=index.device) + means.shape[2]
        global_keys = global_keys.expand_as(index)
        means = torch.cat([means, picked.to(means.dtype)], dim=2)
        counts = F.pad(counts, (0, index.shape[1]))
    return replace(
        call,
        key=means.to(call.key.dtype),
        num_blocks=num_places,
        block_size=blocks_per_place * call.block_size,
        key_counts=counts.expand(call.key.shape[0], -1),
        global_keys=global_keys,
        tokens_per_key=call.tokens_per_key * run,
        means=None,
        shared_blocks=None,
        sampling_seed=sampling.seed_before(call.sampling_seed),
    )


def torch_choice(
    call: ExactCall, with_share: bool = False, with_dropped: bool = False
) -> ExactChoice:
    """The choice in PyTorch, on any device and in any type of float.

    Args:
        call: with the places of a coarser stage, if there was one.
        with_share, with_dropped: what else to return.
    """
    result = empty_choice(call, with_share, with_dropped)
    for batch in range(call.query.shape[0]):
        row = _Row(call, batch)
        for heads, rows in row.chunks():
            row.choose(heads, rows, ExactChoice(*(tensor[batch] for tensor in result)))
    return result


class _Row:
    """One batch row. Tensors are [heads, rows, ...], chunks of heads and query blocks."""

    def __init__(self, call: ExactCall, batch: int) -> None:
        self.call, self.batch = call, batch
        self.shared_heads = call.query.shape[1] // call.key.shape[1]
        self.device = call.query.device
        self.end = torch.full((), call.length, device=self.device)
        if call.ends is not None and not call.is_causal:
            self.end = call.ends[batch]
        size, num_keys = call.keys_per_block, call.num_sequence_keys
        filler = (0, -num_keys % size)
        counts = call.key.new_ones(num_keys, dtype=call.dtype)
        if call.key_counts is not None:
            counts = call.key_counts[batch, :num_keys].to(call.dtype)
        counts = F.pad(counts, filler).unflatten(0, (-1, size))  # [blocks, keys]
        key = F.pad(call.key[batch, :, :num_keys].to(call.dtype), (0, 0, *filler))
        key = key.unflatten(1, (-1, size))  # [key_heads, blocks, keys, head_dim]
        key = key.masked_fill((counts == 0)[..., None], 0.0)
        is_finite = key.isfinite().flatten(2).all(dim=-1)  # [key_heads, blocks]
        self.key = key.masked_fill(~is_finite[..., None, None], 0.0)
        self.log_counts = counts.masked_fill(~is_finite[..., None], 0.0).log()

    def chunks(self) -> Iterator[tuple[slice, slice]]:
        """Ranges of key heads and of query blocks whose scores fit in memory."""
        call = self.call
        num_keys = call.num_candidates * call.keys_per_block
        per_row = call.query_block_size * num_keys
        if call.places is not None:
            per_row = max(per_row, num_keys * call.key.shape[3])  # gathered keys
        limit = _CHUNK_SCORES.get(self.device.type, 2**21)
        per_row = max(per_row * self.shared_heads, 1)
        rows = min(max(1, limit // per_row), max(call.num_rows, 1))
        heads = max(1, limit // (per_row * rows))
        for head in range(0, call.key.shape[1], heads):
            for row in range(0, call.num_rows, rows):
                yield (
                    slice(head, min(head + heads, call.key.shape[1])),
                    slice(row, min(row + rows, call.num_rows)),
                )

    def choose(self, key_heads: slice, rows: slice, result: ExactChoice) -> None:
        """Fills in the results of some query blocks."""
        call = self.call
        heads = slice(key_heads.start * self.shared_heads, key_heads.stop * self.shared_heads)
        query, is_voter, is_valid = self._queries(heads, rows)
        numbers = torch.arange(rows.start, rows.stop, device=self.device) + call.first_row
        blocks = self._candidates(heads, rows, numbers)
        scores = self._scores(query, key_heads, blocks)
        if call.is_causal:
            is_seen = (blocks + 1) * call.block_size <= numbers[:, None] * call.query_block_size
            scores = scores.masked_fill(~is_seen[:, :, None, :, None], -torch.inf)
        others = self._others(query, heads, rows, numbers)  # [heads, rows, queries, globals + 1]
        peak = others.amax(dim=-1)
        if scores.shape[3]:
            peak = torch.maximum(scores.flatten(3).amax(dim=-1), peak)
        peak = peak.clamp(min=torch.finfo(scores.dtype).min)
        weights = (scores - peak[..., None, None]).exp()
        other_weights = (others - peak[..., None]).exp()
        sums = weights.sum(dim=-1)  # [heads, rows, queries, blocks]
        total = sums.sum(dim=-1) + other_weights.sum(dim=-1)
        voters = is_voter / is_voter.sum(dim=-1, keepdim=True).clamp(min=1)
        factor = voters / total.clamp(min=torch.finfo(scores.dtype).tiny)
        factor = factor.masked_fill(~is_valid[..., None], 0.0)[:, :, None]  # [h, rows, 1, queries]
        share = (factor @ sums)[:, :, 0]  # [heads, rows, blocks]
        of_globals = (factor @ other_weights[..., :-1])[:, :, 0].sum(dim=-1)

        is_covered = self._covered(blocks, numbers, heads)
        result.covered[heads, rows] = of_globals + (share * is_covered).sum(dim=-1)
        if result.share.shape[-1]:
            found = share.new_zeros(*share.shape[:2], call.num_key_blocks + 1)
            found.scatter_(-1, blocks.expand_as(share), share)
            result.share[heads, rows] = found[..., :-1]
        if call.places is not None and call.places.weights is not None:
            expanded = blocks.expand_as(share)
            share = share * _weights_of_places(call.places, expanded, self.batch, heads, rows)
        is_open = ~is_covered & (share > 0)  # also False for NaN
        priority = share
        if call.sampling_seed != sampling.NO_SEED:
            head = torch.arange(heads.start, heads.stop, device=self.device)
            words = sampling.row_words(call.sampling_seed, head, numbers)
            priority = share / sampling.chances(words[..., None], blocks)
        best, order = priority.masked_fill(~is_open, 0.0).sort(dim=-1, descending=True, stable=True)
        if call.sampling_seed != sampling.NO_SEED and best.shape[-1] > call.num_blocks:
            result.threshold[heads, rows] = best[..., call.num_blocks]
        order, is_chosen = order[..., : call.num_blocks], best[..., : call.num_blocks] > 0
        found = slice(0, order.shape[-1])
        key_blocks = blocks.expand_as(share).gather(-1, order).where(is_chosen, 0)
        result.key_blocks[heads, rows, found] = key_blocks.int()
        result.mass[heads, rows, found] = share.gather(-1, order).masked_fill(~is_chosen, 0.0)
        result.counts[heads, rows] = is_chosen.sum(dim=-1).int()
        if result.log_dropped.shape[-1]:
            is_kept = is_covered.expand_as(share).scatter(-1, order, is_chosen)
            is_kept = is_kept | is_covered
            dropped = (sums * ~is_kept[:, :, None]).sum(dim=-1) + other_weights[..., -1]
            dropped = (dropped.log() + peak).masked_fill(~is_valid[..., None], -torch.inf)
            self._store_dropped(heads, rows, dropped.masked_fill(is_voter == 0, -torch.inf), result)

    def _voters_of(self, rows: slice) -> torch.Tensor:
        """Which of the queries given vote for query blocks, in order; some are outside."""
        first = (rows.start - self.call.is_causal) * self.call.query_block_size
        count = (rows.stop - rows.start) * self.call.query_block_size
        return torch.arange(first, first + count, device=self.device)

    def _queries(
        self, heads: slice, rows: slice
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The queries that vote [heads, rows, queries, head_dim], scaled; which of them do [rows,
        queries]; and the query blocks [heads, rows] for which only finite ones do.
        """
        call, size = self.call, self.call.query_block_size
        index = self._voters_of(rows)
        is_voter = (index >= 0) & (index < call.query.shape[2])
        index = index.clamp(0, call.query.shape[2] - 1)
        if call.voters is not None:
            is_voter = is_voter & call.voters[self.batch, index + call.length - call.query.shape[2]]
        query = call.query[self.batch, heads].index_select(1, index).to(call.dtype) * call.scale
        query = query.masked_fill(~is_voter[:, None], 0.0).unflatten(1, (-1, size))
        is_valid = query.isfinite().flatten(2).all(dim=-1)
        query = query.masked_fill(~is_valid[..., None, None], 0.0)
        return query, is_voter.unflatten(0, (-1, size)).to(call.dtype), is_valid

    def _candidates(self, heads: slice, rows: slice, numbers: torch.Tensor) -> torch.Tensor:
        """Blocks, ascending: int64 [heads or 1, rows or 1, any]; `num_key_blocks` is none."""
        call, places, nothing = self.call, self.call.places, self.call.num_key_blocks
        if places is None:
            return torch.arange(nothing, device=self.device).view(1, 1, -1)
        width = places.blocks_per_place
        near, last_near = self._reach(numbers)
        near_end = last_near + 1
        if call.is_causal:
            # No place that the query block begins in was a choice.
            place_size = call.block_size * width
            near = torch.minimum(near, numbers * call.query_block_size // place_size * width)
        near = torch.minimum(near, near_end)[:, None]
        counts = places.counts[self.batch, heads, rows, None]
        place = places.numbers[self.batch, heads, rows].long()[..., None]
        is_place = torch.arange(place.shape[-2], device=self.device)
        is_place = is_place < counts
        blocks = (place * width + torch.arange(width, device=self.device)).flatten(-2)
        is_far = (blocks < near) | (blocks >= near_end[:, None])
        is_far = is_far & is_place.repeat_interleave(width, dim=-1) & (blocks < nothing)
        near_blocks = near + torch.arange(call.near_width, device=self.device)
        is_near = (near_blocks < near_end[:, None]) & (near_blocks < nothing)
        near_blocks = near_blocks.where(is_near, nothing).expand(blocks.shape[0], -1, -1)
        blocks = torch.cat([blocks.where(is_far, nothing), near_blocks], dim=-1)
        blocks = F.pad(blocks, (0, call.num_candidates - blocks.shape[-1]), value=nothing)
        blocks = blocks.sort(dim=-1).values
        every = torch.arange(blocks.shape[-1], device=self.device).clamp(max=nothing)
        return blocks.where(counts >= 0, every)

    def _scores(self, query: torch.Tensor, key_heads: slice, blocks: torch.Tensor) -> torch.Tensor:
        """Scores of candidates, with the logarithms of counts: [heads, rows, queries, blocks,
        keys].
        """
        call = self.call
        key, log_counts = self.key[key_heads], self.log_counts[key_heads]
        if call.places is None:
            of_key_head = query.unflatten(0, (-1, self.shared_heads)).flatten(1, 3)
            scores = (of_key_head @ key.flatten(1, 2).mT).unflatten(-1, key.shape[1:3])
            scores = scores + log_counts[:, None]
            scores = scores.unflatten(1, (self.shared_heads, *query.shape[1:3])).flatten(0, 1)
            return scores
        head = torch.arange(key.shape[0], device=self.device)
        head = head.repeat_interleave(self.shared_heads)[:, None, None]
        index = blocks.clamp(max=call.num_key_blocks - 1)
        log_counts = log_counts[head, index]
        log_counts = log_counts.masked_fill((blocks == call.num_key_blocks)[..., None], -torch.inf)
        scores = query @ key[head, index].flatten(2, 3).mT
        return scores.unflatten(-1, log_counts.shape[2:]) + log_counts[:, :, None]

    def _others(
        self, query: torch.Tensor, heads: slice, rows: slice, numbers: torch.Tensor
    ) -> torch.Tensor:
        """Scores of global tokens, and at the end the logarithm of what is in no place."""
        call = self.call
        scores = query.new_full((*query.shape[:3], 1), -torch.inf)
        if call.places is not None:
            rest = call.places.log_rest[self.batch, heads].to(call.dtype)
            index = self._voters_of(rows)
            is_inside = (index >= 0) & (index < rest.shape[1])
            rest = rest[:, index.clamp(0, rest.shape[1] - 1)].masked_fill(~is_inside, -torch.inf)
            counts = call.places.counts[self.batch, heads, rows]
            scores = rest.view_as(scores).masked_fill((counts < 0)[..., None, None], -torch.inf)
        if call.global_positions is None:
            return scores
        positions = call.global_positions[self.batch]
        index = positions if call.global_keys is None else call.global_keys[self.batch]
        keys = call.key[self.batch, :, index.clamp(max=call.key.shape[2] - 1)].to(call.dtype)
        is_seen = positions < call.length
        if call.is_causal:
            is_seen = is_seen & (positions < numbers[:, None, None] * call.query_block_size)
        keys = keys.repeat_interleave(self.shared_heads, dim=0)[heads]  # [heads, globals, head_dim]
        is_finite = keys.isfinite().all(dim=-1)  # [heads, globals]
        keys = keys.masked_fill(~is_finite[..., None], 0.0)
        of_globals = (query.flatten(1, 2) @ keys.mT).view(*query.shape[:3], -1)
        is_seen = is_seen & is_finite[:, None, None]
        return torch.cat([of_globals.masked_fill(~is_seen, -torch.inf), scores], dim=-1)

    def _reach(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return covered_range(self.call, numbers, self.end)

    def _covered(self, blocks: torch.Tensor, numbers: torch.Tensor, heads: slice) -> torch.Tensor:
        """Which blocks are read anyway: what the window covers, and shared ones."""
        first, last = self._reach(numbers)
        is_covered = (blocks >= first[:, None]) & (blocks <= last[:, None])
        if self.call.shared_blocks is not None:
            shared = self.call.shared_blocks[self.batch, heads]
            is_covered = is_covered | (blocks[..., None] == shared[:, None, None]).any(dim=-1)
        return is_covered

    def _store_dropped(
        self, heads: slice, rows: slice, dropped: torch.Tensor, result: ExactChoice
    ) -> None:
        first = (rows.start - self.call.is_causal) * self.call.query_block_size
        dropped = dropped.flatten(1)
        start, end = max(first, 0), min(first + dropped.shape[1], result.log_dropped.shape[1])
        result.log_dropped[heads, start:end] = dropped[:, start - first : end - first]
