"""The cache of the causal model: window layers keep only what can still be seen."""

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from adaptive_longformer.configuration.configuration_adaptive_sparse import AdaptiveSparseConfig
from adaptive_longformer.patterns.sliding_window import SlidingWindow


class SinkWindowLayer(CacheLayerMixin):
    """Keys and values of the sinks and of the last `left` tokens of one layer.

    A slot is a token's place in the sequence with its padding. The window is the same range of
    slots in every row; the sinks, the first tokens that are not padding, are not, so their slots
    are kept beside them.

    Args:
        left: tokens before a query that it sees.
        num_sinks: sinks of a sequence, seen from everywhere after them; 0: there are none.
    """

    is_sliding = True

    def __init__(self, left: int, num_sinks: int) -> None:
        super().__init__()
        self.left, self.num_sinks = left, num_sinks
        self.num_seen = 0

    def lazy_initialization(
        self, key_states: torch.Tensor, value_states: torch.Tensor | None = None
    ) -> None:
        batch, heads, _, head_dim = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = self.values = key_states.new_zeros(batch, heads, 0, head_dim)
        sinks = key_states.new_zeros(batch, heads, self.num_sinks, head_dim)
        self.sink_keys = self.sink_values = sinks
        self.sink_slots = torch.full((batch, self.num_sinks), -1, device=self.device)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, cache_kwargs: dict | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds new tokens and forgets what no later query sees.

        Args:
            key_states, value_states: [batch, heads, new tokens, head_dim].
            cache_kwargs: "sink_rank", int64 [batch or 1, new tokens]: the how-manieth sink a new
                token is, `num_sinks` if it is none. Needed if there are sinks.

        Returns:
            Keys and values that the new tokens may see, the sinks first:
            [batch, heads, num_sinks + tokens of the window, head_dim]; `slots` says whose they are.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.num_sinks:
            assert cache_kwargs is not None
            self._add_sinks(key_states, value_states, cache_kwargs["sink_rank"])
        keys = torch.cat([self.keys, key_states], dim=2)
        values = torch.cat([self.values, value_states], dim=2)
        self.num_seen += key_states.shape[2]
        self.window_start = self.num_seen - keys.shape[2]
        kept = slice(max(0, keys.shape[2] - self.left), None)
        self.keys, self.values = keys[:, :, kept], values[:, :, kept]
        if self.num_sinks:
            keys = torch.cat([self.sink_keys, keys], dim=2)
            values = torch.cat([self.sink_values, values], dim=2)
        return keys, values

    def slots(self) -> torch.Tensor:
        """The slots of the keys that `update` returned last: int64 [batch, keys], -1 for none."""
        window = torch.arange(self.window_start, self.num_seen, device=self.device)
        return torch.cat([self.sink_slots, window.expand(self.sink_slots.shape[0], -1)], dim=1)

    def _add_sinks(
        self, key_states: torch.Tensor, value_states: torch.Tensor, sink_rank: torch.Tensor
    ) -> None:
        sink = torch.arange(self.num_sinks, device=self.device)[:, None]
        matches = sink_rank.expand(key_states.shape[0], -1)[:, None] == sink  # [batch, sinks, new]
        is_new, index = matches.any(dim=2), matches.int().argmax(dim=2)
        self.sink_slots = torch.where(is_new, index + self.num_seen, self.sink_slots)
        is_new, index = is_new[:, None, :, None], index[:, None, :, None]
        self.sink_keys = torch.where(
            is_new, key_states.take_along_dim(index, dim=2), self.sink_keys
        )
        self.sink_values = torch.where(
            is_new, value_states.take_along_dim(index, dim=2), self.sink_values
        )

    def get_seq_length(self) -> int:
        return self.num_seen

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.num_seen + query_length, 0

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized, self.num_seen = False, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError unless nothing is to be removed: what is forgotten is gone."""
        if tokens_to_remove != 0:
            raise ValueError(
                f"crop: tokens_to_remove is {tokens_to_remove}, the cache of a window layer cannot "
                "take tokens back; pass past_key_values=DynamicCache()"
            )

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._map_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map_rows(lambda tensor: tensor[indices])

    def _map_rows(self, change) -> None:
        if self.is_initialized:
            for name in ("keys", "values", "sink_keys", "sink_values", "sink_slots"):
                setattr(self, name, change(getattr(self, name)))


def causal_cache(config: AdaptiveSparseConfig) -> Cache:
    """An empty cache: windows keep what can still be seen, other patterns everything."""
    layers: list[CacheLayerMixin] = []
    for layer_idx in range(config.num_hidden_layers):
        pattern = config.pattern(layer_idx)
        if isinstance(pattern, SlidingWindow):
            assert isinstance(pattern.dilation, int)
            num_sinks = config.num_sink_tokens if config.uses_global_tokens else 0
            layers.append(SinkWindowLayer(pattern.left * pattern.dilation, num_sinks))
        else:
            layers.append(DynamicLayer())
    return Cache(layers=layers)
