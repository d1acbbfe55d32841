"""Foreign causal models after cached tokens, as `generate()` calls them.

Windows and first tokens need keys and values only, which every cache keeps. Choosing blocks also
needs the queries of the block before, which a cache layer of our own keeps.
"""

import weakref
from typing import Any

import torch

from adaptive_longformer.attention.global_keys import limit_global_tokens, pack_global_tokens
from adaptive_longformer.modeling.causal.cache import SelectionLayer
from adaptive_longformer.modeling.causal.selected_decoding import SelectedDecoding
from adaptive_longformer.modeling.dense_attention import dense_attention
from adaptive_longformer.modeling.head_budgets import NO_LIMIT
from adaptive_longformer.modeling.padding import left_padding
from adaptive_longformer.patterns.sliding_window import SlidingWindow
from adaptive_longformer.selection.head_weights import HeadWeights
from adaptive_longformer.selection.options import SelectionOptions
from adaptive_longformer.selection.select_blocks import select_blocks


class ForeignSelectionLayer(SelectionLayer):
    """The cache of one layer of a foreign model, which the keys that it returns lead back to.

    Args:
        options: how blocks are chosen.
        num_global_tokens: so many first tokens are seen from everywhere after them.
        heads_per_key_head: heads of queries that share a head of keys.
    """

    def __init__(
        self, options: SelectionOptions, num_global_tokens: int, heads_per_key_head: int
    ) -> None:
        super().__init__(
            options.query_block_size, options.num_blocks, num_global_tokens, heads_per_key_head
        )
        self.options = options

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds new tokens; which of them are global is known when attention brings the mask."""
        no_sinks = key_states.new_full((1, key_states.shape[2]), self.num_sinks, dtype=torch.int64)
        key, value = super().update(key_states, value_states, {"sink_rank": no_sinks})
        key.cache_layer = weakref.ref(self)  # type: ignore[attr-defined]
        return key, value


def layer_of(key: torch.Tensor) -> ForeignSelectionLayer | None:
    """The cache that keys come from, if it is one of ours."""
    reference = getattr(key, "cache_layer", None)
    return None if reference is None else reference()


def attend_after_cached(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    window: SlidingWindow,
    num_global_tokens: int,
    scale: float,
    dropout_p: float,
) -> torch.Tensor:
    """New tokens read the window before them and the first tokens.

    Args:
        query: [batch, heads, new tokens, head_dim], of the last tokens.
        key, value: [batch, key_heads, tokens, head_dim], what the cache has kept.
        attention_mask: bool [batch, tokens], True where a token is not padding; None: all are.

    Returns:
        [batch, heads, new tokens, head_dim].
    """
    batch, heads, new, _ = query.shape
    total = key.shape[2]
    slot = torch.arange(total, device=query.device)
    query_slot = slot[total - new :, None]
    tokens = attention_mask
    if tokens is None:
        tokens = slot.new_ones(batch, total, dtype=torch.bool)
    is_global = limit_global_tokens(tokens, num_global_tokens)
    # What no row reads stays where it is.
    slot = slot[is_global.any(dim=0) | (slot >= total - new - window.left)]
    visible = (query_slot - slot <= window.left) | is_global[:, None, slot]
    visible = visible & (slot <= query_slot) & tokens[:, None, slot]  # [batch, new, kept]
    key, value = (
        rows[:, :, slot].repeat_interleave(heads // rows.shape[1], dim=1) for rows in (key, value)
    )
    return dense_attention(query, key, value, visible[:, None], scale=scale, dropout_p=dropout_p)[0]


def attend_after_cached_choosing(
    cache: ForeignSelectionLayer,
    query: torch.Tensor,
    queries: torch.Tensor,
    attention_mask: torch.Tensor | None,
    window: SlidingWindow,
    scale: float,
    dropout_p: float,
) -> torch.Tensor:
    """New tokens read the window, the first tokens, and the blocks that their block has chosen.

    Args:
        query, attention_mask: as of `attend_after_cached`.
        queries: what `SelectionLayer.add_queries` returned for them.

    Returns:
        [batch, heads, new tokens, head_dim].
    """
    assert cache.keys is not None
    batch, _, total, _ = cache.keys.shape
    tokens = attention_mask
    if tokens is None:
        tokens = query.new_ones(batch, total, dtype=torch.bool)
    is_global = limit_global_tokens(tokens, cache.num_sinks)
    sink_slots = pack_global_tokens(is_global, cache.num_sinks)
    cache.sink_slots = sink_slots.masked_fill(sink_slots == total, -1)
    sink_rank = torch.where(is_global, is_global.cumsum(dim=1) - 1, cache.num_sinks)
    decoding = SelectedDecoding(
        _PlainSelection(cache.options, window, scale, query.device), cache, attention_mask,
        sink_rank, left_padding(attention_mask), scale, dropout_p,
    )  # fmt: skip
    return decoding.attend(query, queries)[0]


class _PlainSelection:
    """The choice without anything learned, as `SelectedDecoding` asks for it."""

    def __init__(
        self, options: SelectionOptions, window: SlidingWindow, scale: float, device: torch.device
    ) -> None:
        self.options, self.scale, self.device = options, scale, device
        self.window = SlidingWindow(window.left, 0)

    def narrows(self) -> bool:
        return False

    def weights(self, has_ranks: bool = True, has_window: bool = False) -> HeadWeights:
        """All blocks count as the window does."""
        log_weights = torch.zeros(1, 1 + self.options.num_blocks, device=self.device)
        return HeadWeights(log_weights, torch.tensor(NO_LIMIT, device=self.device))

    def choose_next(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        attention_mask: torch.Tensor | None,
        global_mask: torch.Tensor | None,
        means: tuple[torch.Tensor, torch.Tensor] | None = None,
        validate: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """As `AdaptiveSelection.choose_next`."""
        selected = select_blocks(
            query, key, self.window, self.options, attention_mask=attention_mask,
            global_mask=global_mask, is_causal=True, scale=self.scale, means=means,
            validate=validate,
        )  # fmt: skip
        return selected.of_last_row()
