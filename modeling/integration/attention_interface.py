"""Our attention inside other Transformers models: `attn_implementation="adaptive_sparse"`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sliding_window_bidirectional_overlay,
    sliding_window_overlay,
)

from adaptive_longformer.attention.dropout import fresh_dropout
from adaptive_longformer.attention.functional import sparse_attention
from adaptive_longformer.attention.global_keys import limit_global_tokens
from adaptive_longformer.modeling.cache_name import CACHE
from adaptive_longformer.modeling.integration.cached_attention import (
    ForeignSelectionLayer,
    attend_after_cached,
    attend_after_cached_choosing,
    layer_of,
)
from adaptive_longformer.modeling.padding import LeftPadding
from adaptive_longformer.patterns.block_layout import BlockLayout
from adaptive_longformer.patterns.pattern import Pattern
from adaptive_longformer.patterns.sliding_window import SlidingWindow
from adaptive_longformer.selection.lists import selection_layout, weights_of_entries
from adaptive_longformer.selection.options import SelectionOptions
from adaptive_longformer.selection.sampling import NO_SEED
from adaptive_longformer.selection.select_blocks import select_blocks

NAME = "adaptive_sparse"
# What attention layers of Transformers may ask for; None and False ask for nothing.
_UNSUPPORTED = {
    "softcap": "soft-capped scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a position bias",
    "output_attentions": "attention probabilities (attn_implementation='eager' returns them)",
    "cu_seq_lens_q": "packed sequences",
    "cache": "a paged cache",
}


_PLAIN_MASKS = (causal_mask_function, bidirectional_mask_function)
# Every window has a closure of its own, the code behind it is one of these two.
_WINDOW_OVERLAYS = (
    sliding_window_overlay(1).__code__,
    sliding_window_bidirectional_overlay(1).__code__,
)
# Of the numbers of `AdaptiveSparseOptions`, where it is not 1.
_LEAST = {"attention_window": 2, "num_global_tokens": 0, "num_selected_blocks": 0}


@dataclass(frozen=True)
class AdaptiveSparseOptions:
    """What a token of a foreign model reads.

    Attributes:
        attention_window: tokens around each query, half on each side (only the left half under
            causality); even.
        num_global_tokens: so many first tokens see all tokens and are seen by all.
        num_selected_blocks: blocks that every block of queries chooses besides; 0: none.
        block_size, query_block_size: tokens per block of keys and of queries.
        selection_candidates: keys that every query meets when blocks are chosen; means of keys say
            which, but in texts of up to twice as many, where it meets all.
        selection_sampling: whether blocks are drawn by chance, in proportion to their mass, and
            stand for those that are not read: nearer to full attention in a model that was not
            trained to choose.

    Raises:
        ValueError: a number is out of range, or the sizes do not nest.
    """

    attention_window: int = 512
    num_global_tokens: int = 1
    num_selected_blocks: int = SelectionOptions.num_blocks
    block_size: int = SelectionOptions.block_size
    query_block_size: int = SelectionOptions.query_block_size
    selection_candidates: int = SelectionOptions.num_candidates
    selection_sampling: bool = False

    def __post_init__(self) -> None:
        if type(self.selection_sampling) is not bool:
            raise ValueError(
                f"config.{NAME}['selection_sampling'] is {self.selection_sampling!r}, True or "
                "False is needed"
            )
        numbers = {
            name: value for name, value in vars(self).items() if name != "selection_sampling"
        }
        for name, value in numbers.items():
            low, is_even = _LEAST.get(name, 1), name == "attention_window"
            if type(value) is not int or value < low or (is_even and value % 2):
                raise ValueError(
                    f"config.{NAME}[{name!r}] is {value!r}, "
                    f"{'an even' if is_even else 'a whole'} number >= {low} is needed"
                )
        if self.num_selected_blocks:
            self.selection_options()

    def selection_options(self, layer_idx: int = 0) -> SelectionOptions:
        """The same in the words of the selection, for a layer."""
        return SelectionOptions(
            num_blocks=self.num_selected_blocks,
            block_size=self.block_size,
            query_block_size=self.query_block_size,
            num_candidates=self.selection_candidates,
            sampling_seed=layer_idx if self.selection_sampling else NO_SEED,
        )


_overridden: ContextVar[dict[str, Any] | None] = ContextVar("adaptive_sparse_options", default=None)


@contextmanager
def adaptive_sparse_options(**options: Any) -> Iterator[None]:
    """Sets options of `attn_implementation="adaptive_sparse"` for a while, over those of the
    models' configurations.

        with adaptive_sparse_options(attention_window=1024, num_selected_blocks=16):
            model(**inputs)

    Args:
        options: fields of `AdaptiveSparseOptions`.

    Raises:
        ValueError: there is no such option, or a number is out of range.
    """
    _checked_options(options)
    token = _overridden.set(options)
    try:
        yield
    finally:
        _overridden.reset(token)


def adaptive_sparse_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Sliding window, first tokens global, and chosen blocks, with the signature of
    AttentionInterface.

    The dictionary `module.config.adaptive_sparse`, or the context `adaptive_sparse_options`, holds
    fields of `AdaptiveSparseOptions`.

    Args:
        module: the attention module; its class, config and `is_causal` are read.
        query: [batch, heads, length, head_dim].
        key, value: [batch, key_value_heads, length, head_dim], a divisor of the query's heads.
        attention_mask: bool [batch, length], True where a token is not padding, or None.
        sliding_window: the layer's own window, the query counted in: then it is all that is read.
        kwargs: what else the model passes; only what changes nothing is accepted.

    Returns:
        The output [batch, length, heads, head_dim], and None.

    Raises:
        NotImplementedError: the model needs something this pattern cannot do.
        ValueError: the options are wrong.
    """
    for name, meaning in _UNSUPPORTED.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise _not_implemented(f"{meaning} ({name})")
    if _is_cross_attention(module):
        raise _not_implemented(f"the cross-attention of {type(module).__name__}")
    if value.shape[-1] != query.shape[-1]:
        raise _not_implemented("values of another head size than the queries")
    if attention_mask is not None and attention_mask.ndim != 2:
        raise _not_implemented(
            f"an attention_mask of shape {tuple(attention_mask.shape)}; pass [batch, length]"
        )
    options = _options(module.config)
    layer_idx = getattr(module, "layer_idx", None) or 0
    window = SlidingWindow(options.attention_window // 2)
    if sliding_window is not None:
        # A layer that is local by itself stays what it is. Transformers counts the query in.
        options = replace(options, num_global_tokens=0, num_selected_blocks=0)
        window = SlidingWindow(sliding_window - 1)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    cache = layer_of(key)
    if cache is not None:
        _check_same_options(cache, options, layer_idx)
    queries = None if cache is None else cache.add_queries(query)
    if attention_mask is not None:  # a static cache has room behind the last token
        key, value = (rows[:, :, : attention_mask.shape[1]] for rows in (key, value))
    if query.shape[2] != key.shape[2]:
        output = _attend_after_cached(
            cache, query, queries, key, value, attention_mask, window, options, causal, scaling,
            dropout,
        )  # fmt: skip
        return output.transpose(1, 2).contiguous(), None
    # Blocks start at the first real token, wherever the padding is.
    is_selecting = options.num_selected_blocks > 0
    padding = LeftPadding.of(attention_mask if is_selecting else None)
    query, key, value = (padding.removed(tensor, dim=2) for tensor in (query, key, value))
    attention_mask = padding.removed(attention_mask)
    output = _attend(
        query, key, value, attention_mask, window, options, layer_idx, causal, scaling, dropout
    )
    output = padding.restored(output, dim=2).transpose(1, 2)
    return output.contiguous(), None


def adaptive_sparse_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The padding mask as it is, with the signature of AttentionMaskInterface.

    Returns:
        bool [batch, length], True where a token is not padding, or None: all are. Under causality
        it ends with the last query, also where a static cache has room behind it.

    Raises:
        ValueError: the mask does not reach over cached and new tokens.
        NotImplementedError: the model asks for more than causality, padding and a sliding window,
            such as packed sequences.
    """
    if mask_function not in _PLAIN_MASKS and not _is_sliding_window(mask_function):
        raise _not_implemented(
            "a mask beyond causality, padding and a sliding window (chunks, or "
            "packed sequences; if positions are regular, pass an attention_mask of ones)"
        )
    if causal_mask_function not in (mask_function, *_joined(mask_function)):
        return attention_mask
    end = int(q_offset) + q_length
    length = min(kv_length, end - kv_offset)
    if attention_mask is None:
        shape = batch_size, length
        return None if length == kv_length else torch.ones(shape, dtype=torch.bool, device=device)
    if kv_offset and attention_mask.shape[1] == length:
        return attention_mask  # `generate` has cut it already, for a static cache
    if attention_mask.shape[1] < end:
        raise ValueError(
            f"attention_mask is for {attention_mask.shape[1]} tokens, {end} are needed: the cached "
            "and the new ones"
        )
    return attention_mask[:, kv_offset : kv_offset + length]


def _is_sliding_window(mask_function: Callable) -> bool:
    """Whether it is the mask of a layer's own window, whose size the layer also passes as
    `sliding_window`: an overlay and causality, or nothing.
    """
    parts = _joined(mask_function)
    if len(parts) != 2:
        return False
    overlay, rest = parts
    return rest in _PLAIN_MASKS and getattr(overlay, "__code__", None) in _WINDOW_OVERLAYS


def _joined(mask_function: Callable) -> tuple:
    """The mask functions that `and_masks` has joined to one."""
    parts = [cell.cell_contents for cell in mask_function.__closure__ or ()]
    return parts[0] if len(parts) == 1 and isinstance(parts[0], tuple) else ()


def _is_cross_attention(module: nn.Module) -> bool:
    """Whether keys are of another sequence than queries, which their lengths need not show: a class
    of its own, or of BART's kind the layers of a decoder that are not causal.
    """
    of_decoder = getattr(module, "is_decoder", False) and not getattr(module, "is_causal", True)
    return of_decoder or "Cross" in type(module).__name__


def adaptive_sparse_cache(config: PreTrainedConfig) -> Cache:
    """An empty cache for a causal model with `attn_implementation="adaptive_sparse"`.

        model.generate(**inputs, past_key_values=adaptive_sparse_cache(model.config))

    A block of queries chooses by the queries of the block before, which only this cache keeps.
    Where no blocks are chosen every cache of Transformers will do. From Transformers 5.24 on the
    argument is called `cache`.

    Args:
        config: the model's configuration. Options come from it and from the context
            `adaptive_sparse_options`, and must stay the same while the cache is in use.
    """
    cache = DynamicCache(config=config)
    config = config.get_text_config(decoder=True)
    options = _options(config)
    if not options.num_selected_blocks:
        return cache
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    sizes = options.num_global_tokens, heads // key_heads
    cache.layers = [
        ForeignSelectionLayer(options.selection_options(layer_idx), *sizes)
        if type(layer) is DynamicLayer
        else layer
        for layer_idx, layer in enumerate(cache.layers)
    ]
    return cache


def _check_same_options(
    cache: ForeignSelectionLayer, options: AdaptiveSparseOptions, layer_idx: int
) -> None:
    made_for = (cache.options, cache.num_sinks)
    if not options.num_selected_blocks or made_for != (
        options.selection_options(layer_idx),
        options.num_global_tokens,
    ):
        raise ValueError(
            f"{CACHE} was made for {cache.options} and {cache.num_sinks} global tokens, "
            f"the options are {options} now: make the cache by adaptive_sparse_cache where they "
            "hold"
        )


def _options(config: Any) -> AdaptiveSparseOptions:
    return _checked_options({**(getattr(config, NAME, None) or {}), **(_overridden.get() or {})})


def _checked_options(given: dict[str, Any]) -> AdaptiveSparseOptions:
    allowed = [field.name for field in fields(AdaptiveSparseOptions)]
    if unknown := set(given) - set(allowed):
        raise ValueError(
            f"config.{NAME} has unknown options {sorted(unknown)}, allowed are {sorted(allowed)}"
        )
    return AdaptiveSparseOptions(**given)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    window: SlidingWindow,
    options: AdaptiveSparseOptions,
    layer_idx: int,
    is_causal: bool,
    scale: float | None,
    dropout_p: float,
) -> torch.Tensor:
    """Attention in the window, to the first tokens and to the chosen blocks."""
    global_mask = None
    if options.num_global_tokens:
        tokens = attention_mask
        if tokens is None:
            tokens = query.new_ones(query.shape[0], query.shape[2], dtype=torch.bool)
        global_mask = limit_global_tokens(tokens, options.num_global_tokens)
    pattern_or_layout: Pattern | BlockLayout = window
    entry_bias = None
    length = query.shape[2]
    if options.num_selected_blocks and length > window.left + 1:
        choice = options.selection_options(layer_idx)
        selected = select_blocks(
            query.detach(),
            key.detach(),
            window,
            choice,
            attention_mask=attention_mask,
            global_mask=global_mask,
            max_global_tokens=options.num_global_tokens,
            is_causal=is_causal,
            scale=scale,
        )
        pattern_or_layout, slots = selection_layout(selected, window, length, choice)
        entry_bias = weights_of_entries(selected, slots)
    output = sparse_attention(
        query,
        key,
        value,
        pattern_or_layout,
        attention_mask=attention_mask,
        is_causal=is_causal,
        global_mask=global_mask,
        max_global_tokens=options.num_global_tokens,
        entry_bias=entry_bias,
        scale=scale,
        **(fresh_dropout(dropout_p, query.device) if dropout_p else {}),
    )
    assert isinstance(output, torch.Tensor)  # return_lse=False
    return output


def _attend_after_cached(
    cache: ForeignSelectionLayer | None,
    query: torch.Tensor,
    queries: torch.Tensor | None,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    window: SlidingWindow,
    options: AdaptiveSparseOptions,
    is_causal: bool,
    scale: float | None,
    dropout_p: float,
) -> torch.Tensor:
    """The same for the last tokens of those that the keys are of."""
    lengths = f"{query.shape[2]} queries for {key.shape[2]} keys"
    if not is_causal:
        raise _not_implemented(f"{lengths} without causality, such as cross-attention")
    factor = query.shape[3] ** -0.5 if scale is None else scale
    if cache is not None:
        assert queries is not None
        return attend_after_cached_choosing(
            cache, query, queries, attention_mask, window, factor, dropout_p
        )
    if options.num_selected_blocks:
        raise ValueError(
            f"{CACHE}: {lengths}, choosing blocks after cached tokens takes a cache of its own: "
            f"pass {CACHE}=adaptive_sparse_cache(model.config), or choose none "
            "(num_selected_blocks=0), or pass use_cache=False"
        )
    return attend_after_cached(
        query, key, value, attention_mask, window, options.num_global_tokens, factor, dropout_p
    )


def remembering_the_choice(choose: Callable[..., str]) -> Callable[..., str]:
    """`PreTrainedModel.get_correct_attn_implementation` that refuses models which would ignore our
    attention, and writes the choice into the configuration, where loading looks for it.
    """

    @wraps(choose)
    def get_correct_attn_implementation(
        self: PreTrainedModel, requested_attention: str | None, is_init_check: bool = False
    ) -> str:
        chosen = choose(self, requested_attention, is_init_check)
        if chosen == NAME and not self._can_set_attn_implementation():
            raise ValueError(
                f"attn_implementation is {NAME!r}, {type(self).__name__} computes its attention "
                "itself and would ignore it: use 'eager', or another model"
            )
        if chosen == NAME:
            self.config.attn_implementation = NAME
        elif self.config.__dict__.get("attn_implementation") == NAME:
            del self.config.__dict__["attn_implementation"]
        return chosen

    return get_correct_attn_implementation


def _not_implemented(what: str) -> NotImplementedError:
    return NotImplementedError(
        f"attn_implementation={NAME!r} does not support {what}; "
        "use attn_implementation='sdpa' or 'eager' for this model"
    )
