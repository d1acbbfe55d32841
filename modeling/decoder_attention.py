"""Full attention of a decoder: to the text so far, and to the encoded document.

Queries are [batch, heads, length, head_dim], keys and values [batch, heads, key_length, head_dim].
"""

import torch
from torch import nn
from transformers.cache_utils import CacheLayerMixin, EncoderDecoderCache

from adaptive_longformer.configuration.configuration_adaptive_sparse_seq2seq import (
    AdaptiveSparseSeq2SeqConfig,
)
from adaptive_longformer.modeling.dense_attention import dense_attention
from adaptive_longformer.modeling.new_tokens import NewTokens


def causal_mask(new: NewTokens) -> torch.Tensor | None:
    """What new tokens may see: tokens before them and themselves.

    Returns:
        bool [batch or 1, 1, length, keys], True = may attend, or None if everything may be attended
        to. A token always sees itself, so that no row of padding is empty.
    """
    if len(new.slots) == 1 and new.mask is None and new.num_keys == new.total:
        return None
    queries, keys = new.slots[:, None], torch.arange(new.num_keys, device=new.slots.device)
    mask = (keys <= queries)[None, None]
    if new.mask is not None:
        mask = mask & (new.mask[:, None, None, :] | (keys == queries))
    return mask


class DecoderAttention(nn.Module):
    """The projections and the scaled dot products of one attention layer of the decoder."""

    def __init__(self, config: AdaptiveSparseSeq2SeqConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads = config.decoder_attention_heads
        self.head_dim = config.d_model // config.decoder_attention_heads
        self.scale = self.head_dim**-0.5
        self.dropout_p = float(config.attention_dropout)
        sizes = (config.d_model, config.d_model)
        self.query = nn.Linear(*sizes, bias=config.use_bias)
        self.key = nn.Linear(*sizes, bias=config.use_bias)
        self.value = nn.Linear(*sizes, bias=config.use_bias)
        self.output = nn.Linear(*sizes, bias=config.use_bias)

    def _split_heads(self, projected: torch.Tensor) -> torch.Tensor:
        return projected.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _attend(
        self,
        hidden_states: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        output_attentions: bool | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output [batch, length, d_model], and the probabilities if asked for."""
        context, probabilities = dense_attention(
            self._split_heads(self.query(hidden_states)),
            key,
            value,
            mask,
            scale=self.scale,
            dropout_p=self.dropout_p if self.training else 0.0,
            output_attentions=output_attentions,
        )
        return self.output(context.transpose(1, 2).flatten(2)), probabilities


class DecoderSelfAttention(DecoderAttention):
    """Causal attention to the text so far, whose keys and values a cache may hold."""

    is_causal = True

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        output_attentions: bool | None = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output [batch, length, d_model], and attention probabilities before dropout or None, of
        tokens that are added to the cache. The mask is that of `causal_mask`.
        """
        key = self._split_heads(self.key(hidden_states))
        value = self._split_heads(self.value(hidden_states))
        if cache is not None:
            own = cache.self_attention_cache
            key, value = own.update(key, value, self.layer_idx)
        return self._attend(hidden_states, key, value, attention_mask, output_attentions)


class DecoderCrossAttention(DecoderAttention):
    """Attention to the encoded document, whose keys and values are computed and kept once, however
    many texts about it are written at the same time (the beams of a search).
    """

    is_causal = False

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        output_attentions: bool | None = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends and projects.

        Args:
            hidden_states: [batch, length, d_model]; batch is a multiple of the number of documents,
                texts about the same document are neighbours.
            encoder_hidden_states: [documents, document_length, d_model]; not read if the cache has
                their keys and values, which the first call puts there.
            attention_mask: bool [documents, 1, 1, document_length], True where a token of the
                document is not padding; None: all are.

        Returns:
            The output [batch, length, d_model], and the attention probabilities before dropout
            [batch, heads, length, document_length] or None.
        """
        if cache is not None and cache.is_updated.get(self.layer_idx):
            layer = cache.cross_attention_cache.layers[self.layer_idx]
            assert isinstance(layer, CacheLayerMixin)
            key, value = layer.keys, layer.values
            assert key is not None and value is not None
        else:
            key = self._split_heads(self.key(encoder_hidden_states))
            value = self._split_heads(self.value(encoder_hidden_states))
            if cache is not None:
                kept = cache.cross_attention_cache
                key, value = kept.update(key, value, self.layer_idx)
                cache.is_updated[self.layer_idx] = True
        batch_size, length, width = hidden_states.shape
        # All texts about a document as one: nothing between them is compared here.
        num_texts = max(1, batch_size // max(1, key.shape[0]))
        if output_attentions and num_texts > 1:
            # But the probabilities that are returned have to be those that are read.
            key, value = (tensor.repeat_interleave(num_texts, dim=0) for tensor in (key, value))
            if attention_mask is not None:
                attention_mask = attention_mask.repeat_interleave(num_texts, dim=0)
            num_texts = 1
        texts = hidden_states.reshape(key.shape[0], num_texts * length, width)
        output, probabilities = self._attend(texts, key, value, attention_mask, output_attentions)
        return output.reshape(batch_size, length, width), probabilities
