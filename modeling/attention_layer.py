"""The attention layer: projections around the sparse attention operator."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from adaptive_longformer.attention.call import GlobalProjections, GlobalQKV, make_call
from adaptive_longformer.attention.dropout import fresh_dropout
from adaptive_longformer.attention.functional import sparse_attention
from adaptive_longformer.attention.global_keys import GlobalKeys
from adaptive_longformer.attention.reference import dense_attention
from adaptive_longformer.baselines.layers import BASELINES
from adaptive_longformer.configuration.configuration_adaptive_sparse import (
    SELECTING_PATTERNS,
    AdaptiveSparseConfig,
)
from adaptive_longformer.configuration.configuration_adaptive_sparse_seq2seq import (
    AdaptiveSparseSeq2SeqConfig,
)
from adaptive_longformer.modeling.adaptive_selection import AdaptiveSelection, Reads, SelectionState
from adaptive_longformer.modeling.padding import LayerMasks, LeftPadding
from adaptive_longformer.patterns.big_bird import BigBird, big_bird_layout, random_draw
from adaptive_longformer.patterns.block_layout import BlockLayout
from adaptive_longformer.patterns.full import Full
from adaptive_longformer.patterns.pattern import Pattern

_EVERYTHING = Full()
NOTHING_TO_SELECT_WITH = (
    "the model's attention_pattern selects nothing: load it, or an adapter's base, as it was "
    "trained, with attention_pattern='adaptive' (AutoPeftModel...from_pretrained passes it on)"
)


class AdaptiveSparseAttention(nn.Module):
    """Multi-head attention in the pattern of its layer, and the output projection.

    With `config.separate_global_projections` the rows of global tokens attend through their own
    query, key and value projections (Beltagy et al. 2020, section 3.1).

    Args:
        config: the configuration of the model; of an encoder-decoder, the encoder is meant.
        layer_idx: number of the layer, which may have a window of its own.
        output_bias: whether the output projection has a bias; `config.use_bias` says it of the
            others.
    """

    is_causal = False

    def __init__(
        self,
        config: AdaptiveSparseConfig | AdaptiveSparseSeq2SeqConfig,
        layer_idx: int,
        output_bias: bool = True,
    ) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.pattern = config.pattern(layer_idx)
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scale = self.head_dim**-0.5
        self.dropout_p = float(config.attention_probs_dropout_prob)
        sizes = (config.hidden_size, config.hidden_size)
        self.query = nn.Linear(*sizes, bias=config.use_bias)
        self.key = nn.Linear(*sizes, bias=config.use_bias)
        self.value = nn.Linear(*sizes, bias=config.use_bias)
        self.has_global_projections = config.separate_global_projections
        if self.has_global_projections:
            self.query_global = nn.Linear(*sizes, bias=config.use_bias)
            self.key_global = nn.Linear(*sizes, bias=config.use_bias)
            self.value_global = nn.Linear(*sizes, bias=config.use_bias)
        self.output = nn.Linear(*sizes, bias=output_bias)
        baseline = BASELINES.get(config.attention_pattern)
        self.baseline = None if baseline is None else baseline(config, layer_idx)
        self.adaptive = None
        if config.attention_pattern in SELECTING_PATTERNS:
            self.adaptive = AdaptiveSelection(config, layer_idx, self.is_causal)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | LayerMasks | None = None,
        global_mask: torch.Tensor | None = None,
        output_attentions: bool | None = False,
        random_step: torch.Tensor | None = None,
        selection_state: SelectionState | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends and projects.

        Args:
            hidden_states: [batch, length, hidden_size].
            attention_mask: bool [batch, length], True where a token is not padding; None: all are.
                Or both masks as `layer_masks` makes them, once for all layers.
            global_mask: bool [batch, length], True where a token is global; None: none is.
            output_attentions: whether to compute from dense probabilities (O(length^2) memory) and
                return them.
            random_step: int64 scalar tensor, the training step that BigBird's random blocks are
                drawn for; None: none are drawn.
            selection_state: what an adaptive layer remembers of this forward pass.

        Returns:
            The output [batch, length, hidden_size], and the attention probabilities before dropout
            [batch, heads, length, length], whose rows sum to 1, or None.

        Raises:
            ValueError: probabilities are asked for, and a baseline has none.
        """
        if output_attentions and self.baseline is not None:
            raise ValueError(
                "output_attentions is True, attention_pattern "
                f"{self.config.attention_pattern!r} has no probabilities"
            )
        masks = attention_mask
        if not isinstance(masks, LayerMasks):
            masks = layer_masks([self], hidden_states, masks, global_mask)
        hidden_states = masks.padding.removed(hidden_states)
        query, key, value = self._project(hidden_states)
        if self.baseline is not None:
            context, probabilities = self.baseline(query, key, value, masks.given), None
        else:
            context, probabilities = self._attend(
                query,
                key,
                value,
                masks,
                Reads(self._pattern(hidden_states, random_step)),
                selection_state,
                output_attentions,
                self._global_projections(hidden_states),
            )
        context = context.transpose(1, 2).flatten(2)  # [batch, length, hidden_size]
        if masks.given is not None and self._zeroes_padded_rows(hidden_states.shape[1]):
            context = context.masked_fill(~masks.given[..., None], 0.0)
        return self.output(context), probabilities

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args) -> None:
        """As in torch, but what an adapter has learned to select is never left out silently."""
        has_weights = f"{prefix}adaptive.gate" in state_dict
        if has_weights and self.adaptive is None and self.layer_idx == 0:
            # The last argument collects what load_state_dict raises, whether strict or not.
            args[-1].append(f"{prefix}adaptive has weights, but {NOTHING_TO_SELECT_WITH}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    @property
    def is_selecting(self) -> bool:
        """Whether blocks of queries choose blocks of keys to read."""
        return self.adaptive is not None and self.adaptive.is_active

    def _project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Query, key and value [batch, heads, length, head_dim]."""
        modules = (self.query, self.key, self.value)
        return tuple(self._split_heads(module(hidden_states)) for module in modules)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        masks: LayerMasks,
        reads: Reads,
        selection_state: SelectionState | None,
        output_attentions: bool | None,
        global_qkv: GlobalQKV | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Context [batch, heads, length, head_dim] and probabilities of whole sequences, from what
        is given to read or what the layer chooses. Rows have moved as `masks.padding` says, and
        move back.
        """
        padding, is_exported = masks.padding, False
        if self.adaptive is not None and self.adaptive.is_exported and not output_attentions:
            is_exported = True
            reads = self.adaptive.reads_of_graph()
        elif self.adaptive is not None:
            query, reads = self.adaptive(
                query, key, masks.attention_mask, masks.global_keys, selection_state
            )
        call: dict[str, Any] = {
            "attention_mask": masks.attention_mask,
            "is_causal": self.is_causal,
            "global_mask": masks.global_keys,
            "global_qkv": global_qkv,
            "scale": self.scale,
            "entry_bias": reads.entry_bias,
            "span": reads.span,
        }
        dropout_p = self.dropout_p if self.training else 0.0
        if dropout_p:
            call.update(fresh_dropout(dropout_p, query.device))
        if output_attentions:
            attentions = []

            def hand_out(rolled: torch.Tensor) -> torch.Tensor:
                """What is returned has to be what is read, to have a gradient."""
                restored = padding.restored(padding.restored(rolled, dim=3), dim=2, zero=True)
                attentions.append(restored)
                return padding.removed(padding.removed(restored, dim=2), dim=3)

            all_of_call = make_call(query, key, value, reads.pattern_or_layout, **call)
            context, _, _ = dense_attention(all_of_call, hand_out)
            return padding.restored(context, dim=2, zero=True), attentions[0]
        if self.adaptive is not None and is_exported:
            every = make_call(query, key, value, reads.pattern_or_layout, **call)
            return padding.restored(self.adaptive.attend(every), dim=2, zero=True), None
        context = sparse_attention(
            query,
            key,
            value,
            reads.pattern_or_layout,
            backend=self.config.attention_backend,
            **call,
        )
        assert isinstance(context, torch.Tensor)  # return_lse=False
        return padding.restored(context, dim=2, zero=True), None

    def _pattern(
        self, hidden_states: torch.Tensor, random_step: torch.Tensor | None
    ) -> Pattern | BlockLayout:
        """The pattern, or the lists of blocks that stand for it at this length and step."""
        if not isinstance(self.pattern, BigBird):
            return self.pattern
        length = hidden_states.shape[1]
        if length <= self.pattern.dense_length:
            return _EVERYTHING
        draw = None
        if random_step is not None:
            draw = random_draw(self.config.attention_seed, self.layer_idx, random_step)
        return big_bird_layout(self.pattern, length, draw=draw, device=hidden_states.device)

    def _zeroes_padded_rows(self, length: int) -> bool:
        if isinstance(self.pattern, BigBird) and length <= self.pattern.dense_length:
            return False
        return self.config.zero_padded_rows

    def _split_heads(self, projected: torch.Tensor) -> torch.Tensor:
        return projected.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _global_projections(self, hidden_states: torch.Tensor) -> GlobalQKV | None:
        if not self.has_global_projections:
            return None
        modules = (self.query_global, self.key_global, self.value_global)
        if not all(map(is_plain_linear, modules)):
            query, key, value = (self._split_heads(module(hidden_states)) for module in modules)
            return query, key, value
        weights = [tensor for module in modules for tensor in (module.weight, module.bias)]
        return GlobalProjections(hidden_states, *weights)


def layer_masks(
    layers: Sequence[AdaptiveSparseAttention],
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    global_mask: torch.Tensor | None,
) -> LayerMasks:
    """The masks of `AdaptiveSparseAttention.forward`, once for all these layers of a model."""
    is_selecting = any(layer.is_selecting for layer in layers)
    padding = LeftPadding.of(attention_mask if is_selecting else None)
    config = layers[0].config
    masks = LayerMasks.of(attention_mask, global_mask, padding, config.max_global_tokens)
    if global_mask is None and config.separate_global_projections and torch.is_grad_enabled():
        # The operator then gives these projections gradients of zero: DDP waits for them.
        nothing = hidden_states.new_zeros(hidden_states.shape[:2], dtype=torch.bool)
        return masks._replace(global_keys=GlobalKeys(nothing, nothing[:, :0].long()))
    return masks


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module is its weight and bias and nothing more, so that these may be used in its
    place.

    LoRA, quantisation and parametrisations change the class, the weight's or its place; hooks want
    to see the call; offloading and sharding bring the weights only while the module runs.
    """
    return (
        type(module) is nn.Linear
        and "forward" not in module.__dict__
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and type(module._parameters.get("weight")) is nn.Parameter
        and type(module._parameters.get("bias")) in (nn.Parameter, type(None))
        and not module.weight.is_meta
    )
