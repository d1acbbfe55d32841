"""The caches of the causal model.

Windows keep only what can still be seen; layers that choose blocks keep all keys and values.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import pad
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from adaptive_longformer.configuration.configuration_adaptive_sparse import AdaptiveSparseConfig
from adaptive_longformer.modeling.cache_name import CACHE
from adaptive_longformer.patterns.sliding_window import SlidingWindow
from adaptive_longformer.selection.means import run_means


class _RowsMixin:
    """Keys, values and the slots of sinks; repeats, chooses and reorders rows, as beam search does.

    Attributes:
        row_tensors: names of the attributes that have one row per sequence.
        num_sinks: sinks of a sequence, seen from everywhere after them; 0: there are none.
        sink_slots: int64 [batch, num_sinks], slots of the sinks; -1 for one that has not come.
    """

    row_tensors: tuple[str, ...]
    num_sinks: int
    is_initialized: bool

    def lazy_initialization(
        self, key_states: torch.Tensor, value_states: torch.Tensor | None = None
    ) -> None:
        batch, heads, _, head_dim = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = self.values = key_states.new_zeros(batch, heads, 0, head_dim)
        self.sink_slots = torch.full((batch, self.num_sinks), -1, device=self.device)
        self.is_initialized = True

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._map_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map_rows(lambda tensor: tensor[indices.to(tensor.device)])

    def _map_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.is_initialized:
            for name in self.row_tensors:
                setattr(self, name, change(getattr(self, name)))


class SinkWindowLayer(_RowsMixin, CacheLayerMixin):
    """Keys and values of the sinks and of the last `left` tokens of one layer.

    A slot is a token's place in the sequence with its padding. The window is the same range of
    slots in every row; the sinks, the first tokens that are not padding, are not, so their slots
    are kept beside them.

    Args:
        left: tokens before a query that it sees.
        num_sinks: sinks of a sequence, seen from everywhere after them; 0: there are none.
    """

    is_sliding = True
    row_tensors = ("keys", "values", "sink_keys", "sink_values", "sink_slots")

    def __init__(self, left: int, num_sinks: int) -> None:
        super().__init__()
        self.left, self.num_sinks = left, num_sinks
        self.num_seen = 0

    def lazy_initialization(
        self, key_states: torch.Tensor, value_states: torch.Tensor | None = None
    ) -> None:
        super().lazy_initialization(key_states, value_states)
        batch, heads, _, head_dim = key_states.shape
        sinks = key_states.new_zeros(batch, heads, self.num_sinks, head_dim)
        self.sink_keys = self.sink_values = sinks

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
        assert self.keys is not None and self.values is not None
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
        is_new, index = _find_sinks(sink_rank, *self.sink_slots.shape)
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
                f"take tokens back; pass {CACHE}=DynamicCache()"
            )


class SelectionLayer(_RowsMixin, DynamicLayer):
    """All keys and values of a layer that chooses blocks, and what its next choices need.

    A block of queries chooses once, when its first token comes, by the queries of the block before;
    the list then stays until the block ends. Queries of the last blocks are kept for that, one
    block more than needed, so that a block's worth of tokens can be taken back.

    Args:
        query_block_size: tokens per block of queries.
        num_selected_blocks: blocks of keys that a block of queries may choose.
        num_sinks: sinks of a sequence, seen from everywhere after them; 0: there are none.
        heads_per_key_head: heads of queries that share a head of keys.

    Attributes:
        queries: [batch, heads, at most 3 * query_block_size, head_dim], the last ones.
        key_blocks: int64 [batch, heads, num_selected_blocks], the running lists, best first.
        counts: int64 [batch, heads], how many entries of each list count.
        log_weights: float [batch, heads, num_selected_blocks], what is added to the scores of each.
        most_blocks: at least the largest of the counts.
        chosen_at: int64 [batch] on the host, the slot where the block of each row's list begins;
            -1: the row has no list.
        means, mean_counts: [batch, key_heads, room, head_dim] and [batch, room], means of runs of
            keys from each row's first slot on, and how many of them count.
        num_means: int64 [batch] on the host, how many means are there.
        means_begin: int64 [batch] on the host, where the first begins: padding may begin earlier.
    """

    row_tensors = (
        "keys", "values", "queries", "sink_slots", "key_blocks", "counts", "log_weights",
        "chosen_at", "means", "mean_counts", "num_means", "means_begin",
    )  # fmt: skip

    def __init__(
        self,
        query_block_size: int,
        num_selected_blocks: int,
        num_sinks: int,
        heads_per_key_head: int = 1,
    ) -> None:
        super().__init__()
        self.query_block_size, self.num_sinks = query_block_size, num_sinks
        self.num_selected_blocks = num_selected_blocks
        self.heads_per_key_head = heads_per_key_head
        # Buffers with room for more tokens, whose beginning `keys` and `values` are.
        self._roomy: tuple[torch.Tensor, torch.Tensor] | None = None

    def lazy_initialization(
        self, key_states: torch.Tensor, value_states: torch.Tensor | None = None
    ) -> None:
        super().lazy_initialization(key_states, value_states)
        batch, key_heads, _, head_dim = key_states.shape
        heads = key_heads * self.heads_per_key_head
        self.queries = key_states.new_zeros(batch, heads, 0, head_dim)
        shape = (batch, heads, self.num_selected_blocks)
        self.key_blocks = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self.counts = torch.zeros(shape[:2], dtype=torch.int64, device=self.device)
        precise = torch.promote_types(self.dtype, torch.float32)
        self.log_weights = torch.zeros(shape, dtype=precise, device=self.device)
        self.most_blocks = 0
        self.chosen_at = torch.full((batch,), -1)
        self.means = key_states.new_zeros(batch, key_heads, 0, head_dim)
        self.mean_counts = key_states.new_zeros(batch, 0)
        self.num_means, self.means_begin = torch.zeros(2, batch, dtype=torch.int64)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, cache_kwargs: dict | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds new tokens; the arguments are those of `SinkWindowLayer.update`.

        Returns:
            All keys and values, [batch, heads, tokens, head_dim].
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        length = self.keys.shape[2]
        if self.num_sinks:
            assert cache_kwargs is not None
            is_new, index = _find_sinks(cache_kwargs["sink_rank"], *self.sink_slots.shape)
            self.sink_slots = torch.where(is_new, index + length, self.sink_slots)
        if torch.is_grad_enabled() and key_states.requires_grad:
            # Writing into what an earlier step has read would break its gradients.
            self._roomy = None
            self.keys = torch.cat([self.keys, key_states], dim=2)
            self.values = torch.cat([self.values, value_states], dim=2)
            return self.keys, self.values
        total = length + key_states.shape[2]
        if not self._has_room(total):
            batch, heads, _, head_dim = key_states.shape
            shape = (batch, heads, total + max(total // 8, 64), head_dim)
            self._roomy = key_states.new_zeros(shape), value_states.new_zeros(shape)
            self._roomy[0][:, :, :length] = self.keys
            self._roomy[1][:, :, :length] = self.values
        assert self._roomy is not None
        for buffer, states in zip(self._roomy, (key_states, value_states), strict=True):
            buffer[:, :, length:total] = states
        self.keys, self.values = (buffer[:, :, :total] for buffer in self._roomy)
        return self.keys, self.values

    def _has_room(self, total: int) -> bool:
        if self._roomy is None or self._roomy[0].shape[2] < total:
            return False
        # Nothing can be written outside inference mode into what was made inside.
        return self._roomy[0].is_inference() == torch.is_inference_mode_enabled()

    def add_queries(self, query: torch.Tensor) -> torch.Tensor:
        """Keeps the last of the new queries [batch, heads, new tokens, head_dim].

        Returns:
            The queries kept so far and all new ones, of the last tokens in the cache.
        """
        queries = torch.cat([self.queries, query.detach()], dim=2)
        self.queries = queries[:, :, -3 * self.query_block_size :].clone()
        return queries

    def set_lists(
        self,
        rows: list[int],
        begin: int,
        key_blocks: torch.Tensor,
        counts: torch.Tensor,
        log_weights: torch.Tensor | None = None,
    ) -> None:
        """Replaces the lists of some rows.

        Args:
            rows: which.
            begin: slot where the block of queries begins that the lists are for.
            key_blocks: int [rows, heads, blocks], at most `num_selected_blocks`.
            counts: int [rows, heads].
            log_weights: float, shape of key_blocks; None: 0.
        """
        index = torch.tensor(rows)
        self.chosen_at = self.chosen_at.index_fill(0, index, begin)
        index = index.to(self.device)
        filler = (0, self.num_selected_blocks - key_blocks.shape[2])
        self.key_blocks = self.key_blocks.index_copy(0, index, pad(key_blocks.long(), filler))
        self.counts = self.counts.index_copy(0, index, counts.long())
        if log_weights is not None:
            log_weights = pad(log_weights.to(self.log_weights), filler)
            self.log_weights = self.log_weights.index_copy(0, index, log_weights)
        self.most_blocks = int(self.counts.max())

    def key_means(
        self, rows: list[int], keys: slice, run: int, members: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Means of all complete runs of keys; those of earlier calls are not computed again.

        Args:
            rows: which, with the same first slot.
            keys: slots, from the first one of the rows on.
            run: keys per mean.
            members: bool [rows, keys], which count; None: all do.

        Returns:
            The means [rows, heads, runs, head_dim], and how many keys count [rows, runs].
        """
        assert self.keys is not None
        is_ours = self.means_begin[rows] == keys.start
        known, wanted = int((self.num_means[rows] * is_ours).min()), (keys.stop - keys.start) // run
        which = slice(None) if len(rows) == len(self.num_means) else rows
        if known < wanted:
            first, last = known * run, wanted * run
            new = self.keys[which, :, keys.start + first : keys.start + last].detach()
            counts = None if members is None else members[:, first:last]
            means, counts = run_means(new, counts, run)
            if self.means.shape[2] < wanted or self.means.is_inference():
                filler = wanted + max(wanted // 8, 64) - self.means.shape[2]
                self.means = pad(self.means.to(means.dtype), (0, 0, 0, max(filler, 0)))
                self.mean_counts = pad(self.mean_counts.to(counts.dtype), (0, max(filler, 0)))
            self.means[which, :, known:wanted] = means
            self.mean_counts[which, known:wanted] = counts.expand(len(rows), -1)
            self.num_means = self.num_means.index_fill(0, torch.tensor(rows), wanted)
            self.means_begin = self.means_begin.index_fill(0, torch.tensor(rows), keys.start)
        return self.means[which, :, :wanted], self.mean_counts[which, :wanted]

    def reset(self) -> None:
        self.keys = self.values = self._roomy = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Takes tokens back.

        Args:
            tokens_to_remove: as a negative number; a positive one is how many tokens remain, which
                is what older versions of Transformers pass.

        Raises:
            ValueError: the queries that are kept do not reach back far enough.
        """
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        assert self.keys is not None and self.values is not None
        length = self.keys.shape[2]
        remaining = min(tokens_to_remove + (length if tokens_to_remove < 0 else 0), length)
        num_queries = self.queries.shape[2] - (length - remaining)
        if remaining < 0 or num_queries < min(2 * self.query_block_size, remaining):
            raise ValueError(
                f"crop: tokens_to_remove is {tokens_to_remove}, a layer that chooses blocks takes "
                f"back at most query_block_size = {self.query_block_size} tokens at once"
            )
        self.keys, self.values = self.keys[:, :, :remaining], self.values[:, :, :remaining]
        self.queries = self.queries[:, :, :num_queries]
        self.sink_slots = self.sink_slots.masked_fill(self.sink_slots >= remaining, -1)
        self.num_means = torch.zeros_like(self.num_means)
        # A list that begins right after the last token was chosen by tokens that are still there.
        self.chosen_at = self.chosen_at.masked_fill(self.chosen_at > remaining, -1)

    def _map_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super()._map_rows(change)
        self._roomy = None


class CausalCache(Cache):
    """The caches of all layers, of which each keeps what its pattern needs.

    Attributes:
        max_cache_len: -1, there is no limit. PEFT's prefix tuning asks for it.
    """

    max_cache_len = -1


def _find_sinks(
    sink_rank: torch.Tensor, batch_size: int, num_sinks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which sinks are among new tokens, and where: bool and int64 [batch, num_sinks].

    Args:
        sink_rank: int64 [batch or 1, new tokens], see `SinkWindowLayer.update`.
    """
    sink = torch.arange(num_sinks, device=sink_rank.device)[:, None]
    matches = sink_rank.expand(batch_size, -1)[:, None] == sink  # [batch, sinks, new]
    return matches.any(dim=2), matches.int().argmax(dim=2)


def causal_cache(config: AdaptiveSparseConfig, is_selecting: bool | None = None) -> CausalCache:
    """An empty cache: windows keep what can still be seen, other patterns everything.

    Args:
        config: the configuration of the causal model.
        is_selecting: whether its layers choose blocks to read, which takes a cache of all tokens;
            None: as `config.selection_strength` says.
    """
    if is_selecting is None:
        is_selecting = config.attention_pattern == "adaptive" and config.selection_strength > 0
    num_sinks = config.num_sink_tokens if config.uses_global_tokens else 0
    layers: list[Any] = []
    for layer_idx in range(config.num_hidden_layers):
        pattern = config.pattern(layer_idx)
        if is_selecting:
            layers.append(
                SelectionLayer(
                    config.query_block_size, config.selection_options.num_blocks, num_sinks
                )
            )
        elif isinstance(pattern, SlidingWindow):
            assert isinstance(pattern.dilation, int)
            layers.append(SinkWindowLayer(pattern.left * pattern.dilation, num_sinks))
        else:
            layers.append(DynamicLayer())
    return CausalCache(layers=layers)
