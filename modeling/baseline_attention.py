"""Attention that no list of keys expresses, as baselines in the same skeleton."""

import torch
from torch import nn
from transformers import initialization as init

from adaptive_longformer.attention.functional import sparse_attention
from adaptive_longformer.baselines.linear import linear_attention
from adaptive_longformer.baselines.lsh import lsh_attention
from adaptive_longformer.configuration.configuration_adaptive_sparse import (
    BASELINE_PATTERNS,
    AdaptiveSparseConfig,
)
from adaptive_longformer.configuration.configuration_adaptive_sparse_seq2seq import (
    AdaptiveSparseSeq2SeqConfig,
)
from adaptive_longformer.modeling.adaptive_selection import JoinParameters, SelectionState
from adaptive_longformer.modeling.attention_layer import AdaptiveSparseAttention, random_seed


class LinearMix(nn.Module):
    """How much of each head is linear attention: a number per head, 0 in a fresh layer."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.linear_share = nn.Parameter(torch.zeros(num_heads))

    def reset_parameters(self) -> None:
        init.zeros_(self.linear_share)

    def forward(self, local: torch.Tensor, linear: torch.Tensor) -> torch.Tensor:
        """Mixes two outputs [batch, heads, length, head_dim]."""
        return torch.lerp(local, linear, self.linear_share[:, None, None].to(local.dtype))


class BaselineAttention(AdaptiveSparseAttention):
    """The attention layer with one of

    - "linear": elu + 1 linear attention (Katharopoulos et al. 2020);
    - "window_linear": sliding window and linear attention, mixed per head;
    - "lsh": Reformer's hashed buckets (Kitaev et al. 2020); the queries are the keys too.

    Global tokens are ignored. Linear attention and the buckets have no attention dropout and no
    attention probabilities.
    """

    def __init__(
        self,
        config: AdaptiveSparseConfig | AdaptiveSparseSeq2SeqConfig,
        layer_idx: int,
        output_bias: bool = True,
    ) -> None:
        super().__init__(config, layer_idx, output_bias)
        if config.attention_pattern == "window_linear":
            self.adaptive = LinearMix(self.num_heads)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        global_mask: torch.Tensor | None = None,
        output_attentions: bool | None = False,
        random_step: torch.Tensor | None = None,
        selection_state: SelectionState | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends and projects; arguments and result as `AdaptiveSparseAttention.forward`.

        Raises:
            ValueError: probabilities are asked for.
        """
        name = self.config.attention_pattern
        if output_attentions:
            raise ValueError(
                f"output_attentions is True, attention_pattern {name!r} has no probabilities"
            )
        query = self._split_heads(self.query(hidden_states))
        value = self._split_heads(self.value(hidden_states))
        if name == "lsh":
            # Nothing but the gradients that DistributedDataParallel waits for.
            query = JoinParameters.apply(query, *self.key.parameters())
            context = lsh_attention(
                query,
                value,
                chunk_size=self.config.block_size,
                seed=self.layer_idx,
                attention_mask=attention_mask,
                scale=self.scale,
            )
        else:
            key = self._split_heads(self.key(hidden_states))
            context = linear_attention(query, key, value, attention_mask=attention_mask)
            if name == "window_linear":
                assert isinstance(self.adaptive, LinearMix)
                dropout_p = self.dropout_p if self.training else 0.0
                local = sparse_attention(
                    query,
                    key,
                    value,
                    self.pattern,
                    attention_mask=attention_mask,
                    scale=self.scale,
                    dropout_p=dropout_p,
                    dropout_seed=random_seed(query.device) if dropout_p else None,
                    backend=self.config.attention_backend,
                )
                assert isinstance(local, torch.Tensor)  # return_lse=False
                context = self.adaptive(local, context)
        context = context.transpose(1, 2).flatten(2)  # [batch, length, hidden_size]
        if attention_mask is not None and self.config.zero_padded_rows:
            context = context.masked_fill(~attention_mask[..., None], 0.0)
        return self.output(context), None


def encoder_attention(
    config: AdaptiveSparseConfig | AdaptiveSparseSeq2SeqConfig,
    layer_idx: int,
    output_bias: bool = True,
) -> AdaptiveSparseAttention:
    """The attention of an encoder layer, for any `config.attention_pattern`."""
    is_baseline = config.attention_pattern in BASELINE_PATTERNS
    attention = BaselineAttention if is_baseline else AdaptiveSparseAttention
    return attention(config, layer_idx, output_bias)
