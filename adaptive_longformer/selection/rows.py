"""What a search reads of a batch: the pyramid of its keys, the sub-queries that vote, and the
global tokens; and of one row of it, which blocks its query blocks may choose.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch.nn import functional as F

from adaptive_longformer.attention.global_rows import pack_global_tokens
from adaptive_longformer.attention.padding import ordinary_tokens
from adaptive_longformer.selection.options import SelectionCall, blocks_per_node, ceil_div
from adaptive_longformer.selection.pyramid import FAN_OUT, KeyPyramid, key_pyramid
from adaptive_longformer.selection.residual import ResidualScores

# Scores in memory at a time, by device.
_CHUNK_SCORES = {"cpu": 2**20, "cuda": 2**25}


class SelectionTensors(NamedTuple):
    """The tensors of one call, see `select_blocks`; the residual scores as their two factors."""

    query: torch.Tensor
    key: torch.Tensor
    attention_mask: torch.Tensor | None
    global_mask: torch.Tensor | None
    global_directions: torch.Tensor | None
    residual_query: torch.Tensor | None
    residual_key: torch.Tensor | None


class Batch:
    """What the searches of all rows of a batch share."""

    def __init__(self, tensors: SelectionTensors, call: SelectionCall) -> None:
        query, key, attention_mask, global_mask, *_ = tensors
        options = call.options
        self.call = call
        self.size, self.heads = query.shape[:2]
        self.length, self.device = key.shape[2], query.device
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        self.num_rows = ceil_div(query.shape[2], options.query_block_size)
        # Query blocks before those of `query`.
        self.first_row = (self.length - query.shape[2]) // options.query_block_size
        if global_mask is not None and attention_mask is not None:
            global_mask = global_mask & attention_mask
        members = ordinary_tokens(attention_mask, global_mask)
        # Where every row ends, and the length that its search is made for.
        self.ends = self.lengths = [self.length] * self.size
        if attention_mask is not None and not call.is_causal:
            slot = torch.arange(1, self.length + 1, device=self.device)
            self.ends = (attention_mask * slot).amax(dim=1)
            if call.max_global_tokens is None:
                self.ends = self.lengths = self.ends.tolist()
        self.pyramid = self._pyramid(key, members)
        # [batch, heads, query_blocks, sub_queries, head_dim], [batch or 1, query_blocks, ...]
        queries, self.is_voter = self._sub_queries(query, members)
        self.queries = queries * call.scale
        self.global_positions = None
        if global_mask is not None:
            # [batch, G], `length` as filling
            positions = pack_global_tokens(global_mask, call.max_global_tokens)
            if positions.shape[1]:
                self.global_positions = positions
                index = positions.clamp(max=self.length - 1)[:, None, :, None]
                picked = key.take_along_dim(index, dim=2).to(self.dtype)
                self.global_keys = picked.repeat_interleave(self.heads // key.shape[1], dim=1)
        directions = tensors.global_directions
        if directions is None:
            directions = query.new_zeros(self.heads, query.shape[3])
        self.global_directions = directions.to(self.dtype)
        self.residual = None
        if tensors.residual_query is not None and tensors.residual_key is not None:
            factors = (tensors.residual_query, tensors.residual_key)
            self.residual = ResidualScores(*(factor.to(self.dtype) for factor in factors))

    def _pyramid(self, key: torch.Tensor, members: torch.Tensor | None) -> KeyPyramid:
        options = self.call.options
        longest = max(self.lengths, default=0)
        num_levels = options.start_level(ceil_div(longest, options.block_size))
        num_levels = max(num_levels, 2 if options.num_global_blocks else 1)
        sub_block_size = options.block_size // options.sub_blocks
        pyramid = key_pyramid(key, members, sub_block_size, num_levels, options.sub_blocks)
        if key.shape[1] != self.heads:
            repeats = self.heads // key.shape[1]
            means = [mean.repeat_interleave(repeats, dim=1) for mean in pyramid.means]
            pyramid = pyramid._replace(means=means)
        return pyramid

    def _sub_queries(
        self, query: torch.Tensor, members: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        options = self.call.options
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
        if self.call.is_causal:
            # The queries of a block would tell its first tokens about its last ones.
            means = F.pad(means, (0, 0, 0, 0, 1, 0))[:, :, :-1]
            is_voter = F.pad(is_voter, (0, 0, 1, 0), value=False)[:, :-1]
        return means, is_voter


class Row:
    """One row of a batch: views of its tensors, and which blocks its query blocks may choose.

    Query blocks count from the first of the keys, also where only the last ones are given.
    """

    def __init__(self, batch: Batch, index: int) -> None:
        self.batch, self.call, self.options = batch, batch.call, batch.call.options
        self.length, self.end = batch.lengths[index], batch.ends[index]
        self.num_blocks = ceil_div(self.length, self.options.block_size)

        def of_row(tensor: torch.Tensor) -> torch.Tensor:
            return tensor[index if tensor.shape[0] > 1 else 0]

        self.means = [of_row(mean) for mean in batch.pyramid.means]  # each [heads, nodes, head_dim]
        self.log_counts = [of_row(log_count) for log_count in batch.pyramid.log_counts]
        self.queries, self.is_voter = of_row(batch.queries), of_row(batch.is_voter)
        self.global_positions = None
        if batch.global_positions is not None:
            self.global_keys = of_row(batch.global_keys)  # [heads, G, head_dim]
            self.global_positions = of_row(batch.global_positions)
        self.residual: ResidualScores | None = None
        if batch.residual is not None:
            self.residual = ResidualScores(*(of_row(factor) for factor in batch.residual))

    @property
    def covered_width(self) -> int:
        """At least as many blocks as the window covers for any query block."""
        width = (self.call.left + self.call.right) // self.options.block_size + 2
        return min(width, self.num_blocks)

    def covered(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The first and last key block that the window covers for all queries of each query
        block.
        """
        size, start = self.options.block_size, rows * self.options.query_block_size
        end = start + self.options.query_block_size - 1
        if self.call.is_causal:
            # Before the query block only, and whatever the length, for cached decoding.
            last = start // size - 1
        else:
            end = end.clamp(max=self.end - 1)
            reach = start + self.call.right
            last = torch.where(reach >= self.end - 1, self.num_blocks - 1, (reach + 1) // size - 1)
        first = ((end - self.call.left).clamp(min=0) + size - 1) // size
        return first, last

    def limit(self, rows: torch.Tensor) -> torch.Tensor:
        """The number of blocks, from the first, that each query block may choose from."""
        if not self.call.is_causal:
            return torch.full_like(rows, self.num_blocks)
        first, last = self.covered(rows)
        return torch.minimum(first, last + 1).clamp(min=0)

    @cached_property
    def limits(self) -> list[int]:
        """The same for all query blocks, without the device."""
        num_rows = ceil_div(self.length, self.options.query_block_size)
        if not self.call.is_causal:
            return [self.num_blocks] * num_rows
        return self.limit(torch.arange(num_rows)).tolist()

    def chunks(self) -> Iterator[tuple[int, int, int]]:
        """Runs of query blocks [start, end) that begin their search at the same level."""
        options, limits = self.options, self.limits
        # Under causality nobody votes for the first of the query blocks.
        start = self.batch.first_row + int(self.call.is_causal)
        while start < len(limits):
            level = options.start_level(limits[start])
            columns = max(FAN_OUT, options.sub_blocks) * max(
                ceil_div(limits[start], blocks_per_node(level)),
                (options.beam_width + 1) * FAN_OUT if level > 1 else 1,
                self.covered_width,
            )
            # The means that a search gathers are head_dim numbers per column, the scores one per
            # vote.
            per_column = max(self.queries.shape[2], self.queries.shape[3] // 4)
            scores = self.batch.heads * per_column * columns
            step = max(1, _CHUNK_SCORES.get(self.batch.device.type, 2**20) // max(scores, 1))
            end = start + 1
            most = min(start + step, len(limits))
            while end < most and options.start_level(limits[end]) == level:
                end += 1
            if limits[end - 1] > 0:
                yield start, end, level
            start = end
