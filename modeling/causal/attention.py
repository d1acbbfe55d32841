"""The attention layer of the causal model, with and without a cache."""

import torch
from transformers.cache_utils import Cache

from adaptive_longformer.configuration.configuration_adaptive_sparse import AdaptiveSparseConfig
from adaptive_longformer.modeling.adaptive_selection import Reads, SelectionState
from adaptive_longformer.modeling.attention_layer import AdaptiveSparseAttention
from adaptive_longformer.modeling.causal.cache import SelectionLayer, SinkWindowLayer
from adaptive_longformer.modeling.causal.selected_decoding import SelectedDecoding
from adaptive_longformer.modeling.dense_attention import dense_attention
from adaptive_longformer.modeling.padding import LayerMasks, LeftPadding


class CausalSparseAttention(AdaptiveSparseAttention):
    """Multi-head attention in the pattern of its layer to earlier tokens, and to the sinks.

    The sinks (Xiao et al. 2023) are the first tokens of a sequence; all later ones see them. Whole
    sequences go through the sparse operator; new tokens after cached ones attend densely to what
    the cache has kept, or where the layer chooses blocks, to those, the window and the sinks.
    """

    is_causal = True

    def __init__(self, config: AdaptiveSparseConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.num_sinks = config.num_sink_tokens if config.uses_global_tokens else 0

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | LayerMasks | None = None,
        sink_rank: torch.Tensor | None = None,
        output_attentions: bool | None = False,
        slots: torch.Tensor | None = None,
        first_slots: torch.Tensor | None = None,
        selection_state: SelectionState | None = None,
        cache: Cache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends and projects.

        Args:
            hidden_states: [batch, length, hidden_size], of the new tokens.
            attention_mask: after cached tokens bool [batch, keys], True where a token is not
                padding, None: all are; else the masks as `causal_masks` makes them, once for all
                layers.
            sink_rank: int64 [batch, keys], the how-manieth sink a token is, the number of sinks for
                all others; None: there are no sinks.
            slots: int64 [length], where the tokens stand after cached ones; None: there are none.
            first_slots: int64 [batch], where a layer that chooses blocks begins to count them:
                every row's first valid token; None: 0.

        Returns:
            The output [batch, length, hidden_size], and the attention probabilities before dropout
            or None. Their columns are all tokens, or after cached ones what the cache has kept.

        Raises:
            ValueError: a layer that chooses blocks is given a cache that does not keep what that
                takes.
        """
        query, key, value = self._project(hidden_states)
        kept = cache_layer = None
        if cache is not None:
            new_ranks = sink_rank
            if sink_rank is not None and slots is not None:
                new_ranks = sink_rank[:, slots]
            kept = cache.update(key, value, self.layer_idx, {"sink_rank": new_ranks})
            cache_layer = cache.layers[self.layer_idx]
        is_selecting = self.is_selecting
        if is_selecting and cache_layer is not None and not isinstance(cache_layer, SelectionLayer):
            raise ValueError(
                f"cache has a layer of type {type(cache_layer).__name__}, a layer "
                "that chooses blocks needs a SelectionLayer: pass none, and one is made, or "
                "make one by adaptive_longformer.modeling.causal.cache.causal_cache"
            )
        queries = None
        if isinstance(cache_layer, SelectionLayer):
            queries = cache_layer.add_queries(query)
        dropout_p = self.dropout_p if self.training else 0.0
        if isinstance(attention_mask, LayerMasks):
            removed = attention_mask.padding.removed
            context, probabilities = self._attend(
                removed(query, dim=2), removed(key, dim=2), removed(value, dim=2), attention_mask,
                Reads(self.pattern), selection_state, output_attentions,
            )  # fmt: skip
        elif is_selecting:
            assert self.adaptive is not None and queries is not None
            assert isinstance(cache_layer, SelectionLayer)
            decoding = SelectedDecoding(
                self.adaptive, cache_layer, attention_mask, sink_rank, first_slots, self.scale,
                dropout_p, selection_state is not None and selection_state.validate,
            )  # fmt: skip
            context, probabilities = decoding.attend(query, queries, output_attentions)
        else:
            assert kept is not None and slots is not None
            visible = self._visible(cache_layer, slots, kept[0], attention_mask, sink_rank)
            context, probabilities = dense_attention(
                query,
                *kept,
                visible,
                scale=self.scale,
                dropout_p=dropout_p,
                output_attentions=output_attentions,
            )
        return self.output(context.transpose(1, 2).flatten(2)), probabilities

    def _visible(
        self,
        cache_layer: object,
        query_slots: torch.Tensor,
        key: torch.Tensor,
        attention_mask: torch.Tensor | None,
        sink_rank: torch.Tensor | None,
    ) -> torch.Tensor:
        """Which of the kept keys every new token sees: bool [batch or 1, 1, new, kept]."""
        num_packed = 0
        if isinstance(cache_layer, SinkWindowLayer):
            num_packed, slots = cache_layer.num_sinks, cache_layer.slots()
        else:
            slots = torch.arange(key.shape[2], device=key.device)[None]
        query_slot = query_slots.to(key.device)[:, None]
        key_slot = slots.clamp(min=0)[:, None]  # [batch or 1, 1, kept]
        head = torch.zeros((), dtype=torch.int64, device=key.device)
        visible = self.pattern.allowed(query_slot, key_slot, head, key.shape[2])
        if sink_rank is not None:
            is_sink = (sink_rank < self.num_sinks).take_along_dim(key_slot[:, 0], dim=1)[:, None]
            # Sinks that the window covers are there twice: only those in front count.
            is_packed = torch.arange(key.shape[2], device=key.device) < num_packed
            visible = is_packed | (visible & ~is_sink if num_packed else visible | is_sink)
        visible = visible & (key_slot <= query_slot) & (slots >= 0)[:, None]
        if attention_mask is not None:
            visible = visible & attention_mask.take_along_dim(key_slot[:, 0], dim=1)[:, None]
        return visible[:, None]


def causal_masks(
    attention_mask: torch.Tensor | None,
    sink_rank: torch.Tensor | None,
    first_slots: torch.Tensor | None,
    num_sinks: int,
    length: int,
) -> LayerMasks:
    """The masks of whole sequences, from those that `CausalSparseAttention.forward` describes."""
    is_sink = None if sink_rank is None else sink_rank < num_sinks
    return LayerMasks.of(attention_mask, is_sink, LeftPadding.by(first_slots, length), num_sinks)
