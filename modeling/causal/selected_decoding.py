"""Cached decoding of a layer that chooses blocks.

A new token reads the sinks, the window before it, and the blocks in the list of its block of
queries; nothing else of the cache is touched, except once per block of queries, when its list is
made: from the means of all kept keys, which grow as keys come, and the keys of the candidates.
"""

from itertools import pairwise
from typing import Protocol

import torch

from adaptive_longformer.attention.padding import ordinary_tokens
from adaptive_longformer.attention.reference import span_log_weight
from adaptive_longformer.modeling.causal.cache import SelectionLayer
from adaptive_longformer.modeling.dense_attention import dense_attention
from adaptive_longformer.patterns.sliding_window import SlidingWindow
from adaptive_longformer.selection.exact import ALL_PER_CANDIDATE, TOKENS_PER_MEAN
from adaptive_longformer.selection.head_weights import HeadWeights
from adaptive_longformer.selection.options import SelectionOptions


class Choice(Protocol):
    """What chooses and weighs, such as `AdaptiveSelection`."""

    options: SelectionOptions
    window: SlidingWindow

    def narrows(self) -> bool: ...

    def weights(self, has_ranks: bool = True, has_window: bool = True) -> HeadWeights: ...

    def choose_next(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        attention_mask: torch.Tensor | None,
        global_mask: torch.Tensor | None,
        means: tuple[torch.Tensor, torch.Tensor] | None = None,
        validate: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]: ...


class SelectedDecoding:
    """New tokens of one layer after cached ones.

    Blocks count from each row's first valid token, so rows begin theirs at different slots. The new
    tokens are taken in runs in which no row begins a block, all rows together.

    Args:
        part: what chooses.
        cache: the layer's cache, the new tokens included.
        attention_mask: bool [batch, tokens in the cache], True where a token is not padding; None:
            all are.
        sink_rank: int64 [batch, tokens in the cache], see `CausalSparseAttention.forward`.
        first_slots: int64 [batch], slot of every row's first valid token; None: 0.
        scale: factor of the scores.
        dropout_p: probability that an attention weight is dropped.
        validate: whether to raise on values that are not finite.
    """

    def __init__(
        self,
        part: Choice,
        cache: SelectionLayer,
        attention_mask: torch.Tensor | None,
        sink_rank: torch.Tensor | None,
        first_slots: torch.Tensor | None,
        scale: float,
        dropout_p: float = 0.0,
        validate: bool = False,
    ) -> None:
        assert cache.keys is not None and cache.values is not None
        self.part, self.cache = part, cache
        self.keys, self.values = cache.keys, cache.values
        self.batch, key_heads, self.total, _ = self.keys.shape
        self.heads = key_heads * cache.heads_per_key_head
        self.device = self.keys.device
        self.attention_mask, self.sink_rank = attention_mask, sink_rank
        self.first_slots = [0] * self.batch if first_slots is None else first_slots.tolist()
        self.scale, self.dropout_p, self.validate = scale, dropout_p, validate

    def attend(
        self, query: torch.Tensor, queries: torch.Tensor, output_attentions: bool | None = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends.

        Args:
            query: [batch, heads, new tokens, head_dim].
            queries: what `SelectionLayer.add_queries` returned for them.
            output_attentions: whether to return the probabilities as well.

        Returns:
            [batch, heads, new tokens, head_dim], and the attention probabilities before dropout
            [batch, heads, new tokens, tokens in the cache] or None.
        """
        past_length = self.total - query.shape[2]
        outputs, probabilities = [], []
        for begin, end in pairwise(self._runs(past_length)):
            self._choose(begin, queries)
            of_run = query[:, :, begin - past_length : end - past_length]
            output, dense = self._attend_run(of_run, begin, end, output_attentions)
            outputs.append(output)
            probabilities.append(dense)
        dense = torch.cat(probabilities, dim=2) if output_attentions else None
        return torch.cat(outputs, dim=2), dense

    def _runs(self, past_length: int) -> list[int]:
        """Where the runs begin, and the end of the last."""
        size = self.part.options.query_block_size
        begins = {past_length}
        for first in set(self.first_slots):
            begins.update(range(past_length + (first - past_length) % size, self.total, size))
        return [*sorted(begins), self.total]

    def _choose(self, slot: int, queries: torch.Tensor) -> None:
        """Makes the lists of the blocks of queries that a slot is in, where they are not made."""
        size = self.part.options.query_block_size
        chosen_at = self.cache.chosen_at.tolist()
        rows_by_start: dict[int, list[int]] = {}
        for row, first in enumerate(self.first_slots):
            if slot >= first and chosen_at[row] != slot - (slot - first) % size:
                rows_by_start.setdefault(first, []).append(row)
        for first, rows in rows_by_start.items():
            begin = slot - (slot - first) % size
            which = slice(None) if len(rows) == self.batch else rows
            # The first block has none before it, which could vote or be chosen.
            if begin == first:
                nothing = self.cache.counts[which] * 0
                self.cache.set_lists(rows, begin, nothing[..., None], nothing)
                continue
            behind = self.total - queries.shape[2]  # slot of the first of the queries
            seen = slice(first, begin + 1)
            mask = None if self.attention_mask is None else self.attention_mask[which, seen]
            is_sink = None
            if self.sink_rank is not None:
                is_sink = self.sink_rank[which, seen] < self.cache.num_sinks
            means = None
            if begin - first >= ALL_PER_CANDIDATE * self.part.options.num_candidates:
                members = ordinary_tokens(mask, is_sink)
                means = self.cache.key_means(rows, slice(first, begin), TOKENS_PER_MEAN, members)
            lists = self.part.choose_next(
                queries[which, :, begin - size - behind : begin + 1 - behind],
                self.keys[which, :, seen].detach(),
                mask,
                is_sink,
                means,
                self.validate,
            )
            self.cache.set_lists(rows, begin, *lists)

    def _attend_run(
        self, query: torch.Tensor, begin: int, end: int, output_attentions: bool | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The tokens of the slots [begin, end), which share a list in every row."""
        slot = torch.arange(begin, end, device=self.device)[:, None]
        near = slice(max(0, begin - self.part.window.left), end)
        weights = self.part.weights(has_window=self.part.narrows())
        parts = [self._sinks(slot), self._window(near, slot, weights), self._blocks(slot, weights)]
        slots = [slots for slots, _ in parts]
        key, value = (
            torch.cat([self._at(slots[0], kept), near_kept, self._at(slots[2], kept)], dim=2)
            for kept in (self.keys, self.values)
            for near_kept in [self._of_all_heads(kept[:, :, near])]
        )
        shape = (self.batch, self.heads, end - begin, -1)
        bias = torch.cat([bias.to(query.dtype).expand(shape) for _, bias in parts], dim=3)
        output, weights = dense_attention(
            query,
            key,
            value,
            bias,
            scale=self.scale,
            dropout_p=self.dropout_p,
            output_attentions=output_attentions,
        )
        if weights is None:
            return output, None
        dense = weights.new_zeros(*weights.shape[:3], self.total)
        index = torch.cat([part.expand(self.batch, self.heads, -1) for part in slots], dim=2)
        return output, dense.scatter_add(3, index[:, :, None].expand_as(weights), weights)

    def _of_all_heads(self, kept: torch.Tensor) -> torch.Tensor:
        repeats = self.cache.heads_per_key_head
        return kept if repeats == 1 else kept.repeat_interleave(repeats, dim=1)

    def _at(self, slots: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Kept keys or values at slots [batch, heads or 1, keys], for every head of queries."""
        batch = torch.arange(self.batch, device=self.device)[:, None, None]
        head = torch.arange(self.heads, device=self.device)[:, None]
        return kept[batch, head // self.cache.heads_per_key_head, slots]

    # Each of the three below returns the slots of keys, int64 [batch or 1, heads or 1, keys], and
    # what is added to their scores, [batch or 1, heads or 1, queries, keys]. A key counts once: as
    # a sink, else in the window, else in its block.

    def _sinks(self, slot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        slots = self.cache.sink_slots[:, None]  # [batch, 1, sinks]
        is_seen = (slots >= 0)[:, :, None] & (slots[:, :, None] <= slot)
        return slots.clamp(min=0), _closed_unless(is_seen)

    def _window(
        self, near: slice, slot: torch.Tensor, weights: HeadWeights
    ) -> tuple[torch.Tensor, torch.Tensor]:
        slots = torch.arange(near.start, near.stop, device=self.device)[None]
        distance = slot - slots  # [queries, keys]
        is_near = (distance >= 0) & (distance <= self.part.window.left)
        bias = _closed_unless(is_near & self._is_ordinary(slots)[:, None, None])
        if weights.span is not None:
            bias = bias + span_log_weight(weights.span, distance.abs())
        return slots[None], bias

    def _blocks(
        self, slot: torch.Tensor, weights: HeadWeights
    ) -> tuple[torch.Tensor, torch.Tensor]:
        size, count = self.part.options.block_size, self.cache.most_blocks
        offset = torch.arange(size, device=self.device)
        blocks = self.cache.key_blocks[:, :, :count, None] * size + offset
        first = torch.tensor(self.first_slots, device=self.device)[:, None, None]
        slots = (blocks.flatten(2) + first).clamp(max=self.total - 1)  # [batch, heads, keys]
        assert weights.log_weights is not None and weights.rank_limit is not None
        counts = torch.minimum(self.cache.counts, weights.rank_limit)
        is_used = torch.arange(count, device=self.device) < counts[..., None]
        is_seen = is_used.repeat_interleave(size, dim=2)
        is_seen = is_seen & self._is_ordinary(slots.flatten(1)).view_as(slots)
        is_outside = slot - slots[:, :, None] > self.part.window.left
        bias = weights.log_weights[:, 1 : 1 + count] + self.cache.log_weights[:, :, :count]
        bias = bias.repeat_interleave(size, dim=2)[:, :, None]
        return slots, _closed_unless(is_seen[:, :, None] & is_outside) + bias

    def _is_ordinary(self, slots: torch.Tensor) -> torch.Tensor:
        """Which keys are neither padding nor sinks: bool [batch, keys] of slots [batch or 1,
        keys].
        """
        slots = slots.expand(self.batch, -1)
        is_ordinary = torch.ones(slots.shape, dtype=torch.bool, device=self.device)
        if self.attention_mask is not None:
            is_ordinary = self.attention_mask.take_along_dim(slots, dim=1)
        if self.sink_rank is not None:
            rank = self.sink_rank.take_along_dim(slots, dim=1)
            is_ordinary = is_ordinary & (rank >= self.cache.num_sinks)
        return is_ordinary


def _closed_unless(is_seen: torch.Tensor) -> torch.Tensor:
    """0 where a key is seen, -inf elsewhere."""
    return torch.zeros(is_seen.shape, device=is_seen.device).masked_fill(~is_seen, -torch.inf)
