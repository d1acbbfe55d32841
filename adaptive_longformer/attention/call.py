"""One call of the attention operator, as every backend receives it."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from adaptive_longformer.patterns.block_layout import BlockLayout
from adaptive_longformer.patterns.pattern import Pattern


class AttentionSpan(NamedTuple):
    """A learned window per head: weights exp(score) * clamp((ramp + length_h - |j - i|) / ramp, 0,
    1).

    Attributes:
        length: float [heads], tokens up to which the window keeps its full weight. Learnable.
        ramp: tokens over which the weight then falls to zero.

    Acts on the keys of the window only, never on global, selected or pattern keys.
    Source: Sukhbaatar et al. 2019, with an additive logarithm in place of the product.
    """

    length: torch.Tensor
    ramp: float


class GlobalProjections(NamedTuple):
    """The separate projections of Longformer's global queries, not yet applied.

    A backend computes only what the few global rows need: with fewer global tokens x heads than
    channels the key and value projections are absorbed into the query and the output, instead of
    projecting all tokens.

    Attributes:
        hidden_states: [batch, length, hidden_size].
        query_weight, key_weight, value_weight: [heads * head_dim, hidden_size], as nn.Linear stores
            them.
        query_bias, key_bias, value_bias: [heads * head_dim] or None.
    """

    hidden_states: torch.Tensor
    query_weight: torch.Tensor
    query_bias: torch.Tensor | None
    key_weight: torch.Tensor
    key_bias: torch.Tensor | None
    value_weight: torch.Tensor
    value_bias: torch.Tensor | None

    def project(self, num_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The explicit query, key and value of all tokens, each [batch, heads, length,
        head_dim].
        """

        def split(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            projected = torch.nn.functional.linear(self.hidden_states, weight, bias)
            return projected.unflatten(-1, (num_heads, -1)).transpose(1, 2)

        return (
            split(self.query_weight, self.query_bias),
            split(self.key_weight, self.key_bias),
            split(self.value_weight, self.value_bias),
        )


GlobalQKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor] | GlobalProjections


@dataclass(frozen=True)
class AttentionCall:
    """The checked arguments of `sparse_attention`.

    Exactly one of `pattern` (without global tokens, they are in `global_mask`) and `layout` is
    given; `global_mask` marks no padding; `entry_bias` includes the layout's own bias.
    `max_global_tokens` is the number of global rows to compute; None: as many as the mask has.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    pattern: Pattern | None = None
    layout: BlockLayout | None = None
    attention_mask: torch.Tensor | None = None
    is_causal: bool = False
    global_mask: torch.Tensor | None = None
    max_global_tokens: int | None = None
    global_qkv: GlobalQKV | None = None
    entry_bias: torch.Tensor | None = None
    span: AttentionSpan | None = None
    dropout_p: float = 0.0
    dropout_seed: torch.Tensor | None = None
    return_lse: bool = False
