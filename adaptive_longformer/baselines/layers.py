"""Attention that no list of keys expresses, in the place of the operator in an attention layer.

Queries, keys and values are projected, [batch, heads, length, head_dim]. Global tokens are ignored.
Linear attention and the buckets have no attention dropout, and none has attention probabilities.
"""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from adaptive_longformer.attention.dropout import fresh_dropout
from adaptive_longformer.attention.functional import sparse_attention
from adaptive_longformer.attention.join_gradients import JoinGradients
from adaptive_longformer.baselines.linear import linear_attention
from adaptive_longformer.baselines.lsh import lsh_attention


class LinearAttention(nn.Module):
    """elu + 1 linear attention (Katharopoulos et al. 2020).

    Args:
        config: the configuration of the model.
        layer_idx: number of the layer.
    """

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The output [batch, heads, length, head_dim]; `attention_mask` is bool [batch, length]."""
        return linear_attention(query, key, value, attention_mask=attention_mask)


class WindowLinearAttention(LinearAttention):
    """A sliding window and linear attention, mixed by a number per head, 0 in a fresh layer."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.window = config.pattern(layer_idx)
        self.linear_share = nn.Parameter(torch.zeros(config.num_attention_heads))

    def reset_parameters(self) -> None:
        init.zeros_(self.linear_share)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        dropout_p = float(self.config.attention_probs_dropout_prob) if self.training else 0.0
        local = sparse_attention(
            query,
            key,
            value,
            self.window,
            attention_mask=attention_mask,
            backend=self.config.attention_backend,
            **(fresh_dropout(dropout_p, query.device) if dropout_p else {}),
        )
        assert isinstance(local, torch.Tensor)  # return_lse=False
        linear = super().forward(query, key, value, attention_mask)
        return torch.lerp(local, linear, self.linear_share[:, None, None].to(local.dtype))


class LSHAttention(LinearAttention):
    """Reformer's hashed buckets (Kitaev et al. 2020); the queries are the keys too."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        query = JoinGradients.apply(query, key)  # type: ignore[assignment]
        return lsh_attention(
            query,
            value,
            chunk_size=self.config.block_size,
            seed=self.layer_idx,
            attention_mask=attention_mask,
        )


# By the name of `config.attention_pattern`.
BASELINES = {
    "linear": LinearAttention,
    "window_linear": WindowLinearAttention,
    "lsh": LSHAttention,
}
