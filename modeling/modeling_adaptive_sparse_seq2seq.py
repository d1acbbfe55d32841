"""The adaptive_sparse_seq2seq encoder-decoder and its task heads.

Hidden states are [batch, length, d_model] everywhere.
"""

import math
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.generation.utils import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
    Seq2SeqQuestionAnsweringModelOutput,
    Seq2SeqSequenceClassifierOutput,
)
from transformers.models.bart.modeling_bart import (
    BartClassificationHead,
    BartScaledWordEmbedding,
    shift_tokens_right,
)
from transformers.utils import logging
from transformers.utils.generic import ModelOutput, can_return_tuple
from transformers.utils.output_capturing import capture_outputs
from typing_extensions import Unpack

from adaptive_longformer.attention.padding import may_look
from adaptive_longformer.configuration.configuration_adaptive_sparse_seq2seq import (
    AdaptiveSparseSeq2SeqConfig,
)
from adaptive_longformer.modeling.adaptive_selection import SelectionState
from adaptive_longformer.modeling.attention_layer import AdaptiveSparseAttention
from adaptive_longformer.modeling.cache_name import CACHE, takes_cache
from adaptive_longformer.modeling.decoder_attention import (
    DecoderCrossAttention,
    DecoderSelfAttention,
    causal_mask,
)
from adaptive_longformer.modeling.default_global_tokens import encoder_masks
from adaptive_longformer.modeling.input_checks import (
    boolean_mask,
    check_extra_arguments,
    check_inputs,
    check_length,
)
from adaptive_longformer.modeling.losses import (
    classification_loss,
    span_loss,
    token_loss,
)
from adaptive_longformer.modeling.modeling_adaptive_sparse import (
    AdaptiveSparsePreTrainedModel,
    OutputArguments,
    RandomStep,
    beside_the_head,
    returning_a_dict,
)
from adaptive_longformer.modeling.new_tokens import new_tokens, padded_mask
from adaptive_longformer.modeling.padding import LayerMasks, effective_mask

logger = logging.get_logger(__name__)

FORGOTTEN_GLOBAL_MASK = (
    "No global_attention_mask was given and config.default_global_tokens is 'none': every token of "
    "the document sees only its window, which is what the source model does. Summaries need a "
    'global first token: set config.default_global_tokens = "first", or pass a '
    "global_attention_mask."
)


class AdaptiveSparseSeq2SeqEmbeddings(nn.Module):
    """The sum of word and position embeddings; normalised where the layers normalise at their end.

    Positions are slots: padding counts, on either side.
    """

    def __init__(self, config: AdaptiveSparseSeq2SeqConfig, num_positions: int) -> None:
        super().__init__()
        scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
        self.word_embeddings: nn.Embedding = BartScaledWordEmbedding(
            config.vocab_size, config.d_model, cast(Any, config.pad_token_id), embed_scale=scale
        )
        self.position_embeddings = nn.Embedding(num_positions, config.d_model)
        self.layer_norm = nn.LayerNorm(config.d_model) if config.norm_style == "post" else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        slots: torch.Tensor | None = None,
    ) -> torch.Tensor:
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if slots is None:
            slots = torch.arange(words.shape[1], device=words.device)
        embeddings = words + self.position_embeddings(slots)
        if self.layer_norm is not None:
            embeddings = self.layer_norm(embeddings)
        return self.dropout(embeddings)


class AdaptiveSparseSeq2SeqSublayers(GradientCheckpointingLayer):
    """What encoder and decoder layers share: residual connections and the feed-forward sublayer."""

    def __init__(self, config: AdaptiveSparseSeq2SeqConfig, intermediate_size: int) -> None:
        super().__init__()
        self.normalises_first = config.norm_style == "pre"
        self.intermediate = nn.Linear(config.d_model, intermediate_size)
        self.activation = ACT2FN[config.activation_function]
        self.output = nn.Linear(intermediate_size, config.d_model)
        self.output_layer_norm = nn.LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.activation_dropout = nn.Dropout(config.activation_dropout)

    def _before(self, layer_norm: nn.LayerNorm, hidden_states: torch.Tensor) -> torch.Tensor:
        """What a sublayer reads."""
        return layer_norm(hidden_states) if self.normalises_first else hidden_states

    def _after(
        self, layer_norm: nn.LayerNorm, hidden_states: torch.Tensor, update: torch.Tensor
    ) -> torch.Tensor:
        """The hidden states with what a sublayer found."""
        hidden_states = hidden_states + self.dropout(update)
        return hidden_states if self.normalises_first else layer_norm(hidden_states)

    def _feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        read = self._before(self.output_layer_norm, hidden_states)
        update = self.output(self.activation_dropout(self.activation(self.intermediate(read))))
        return self._after(self.output_layer_norm, hidden_states, update)


class AdaptiveSparseSeq2SeqEncoderLayer(AdaptiveSparseSeq2SeqSublayers):
    """Sparse attention and feed-forward."""

    def __init__(self, config: AdaptiveSparseSeq2SeqConfig, layer_idx: int) -> None:
        super().__init__(config, config.encoder_ffn_dim)
        self.attention = AdaptiveSparseAttention(config, layer_idx, output_bias=config.use_bias)
        self.attention_layer_norm = nn.LayerNorm(config.d_model)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | LayerMasks | None = None,
        global_mask: torch.Tensor | None = None,
        output_attentions: bool | None = False,
        random_step: torch.Tensor | None = None,
        selection_state: SelectionState | None = None,
    ) -> torch.Tensor:
        read = self._before(self.attention_layer_norm, hidden_states)
        attended, _ = self.attention(
            read, attention_mask, global_mask, output_attentions, random_step, selection_state
        )
        hidden_states = self._after(self.attention_layer_norm, hidden_states, attended)
        hidden_states = self._feed_forward(hidden_states)
        if hidden_states.dtype == torch.float16:
            # The residual stream of pre-norm models overflows there.
            largest = torch.finfo(torch.float16).max - 1000
            hidden_states = hidden_states.clamp(-largest, largest)
        return hidden_states


class AdaptiveSparseSeq2SeqDecoderLayer(AdaptiveSparseSeq2SeqSublayers):
    """Causal self-attention, attention to the document, and feed-forward."""

    def __init__(self, config: AdaptiveSparseSeq2SeqConfig, layer_idx: int) -> None:
        super().__init__(config, config.decoder_ffn_dim)
        self.self_attention = DecoderSelfAttention(config, layer_idx)
        self.self_attention_layer_norm = nn.LayerNorm(config.d_model)
        self.cross_attention = DecoderCrossAttention(config, layer_idx)
        self.cross_attention_layer_norm = nn.LayerNorm(config.d_model)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None,
        cache: EncoderDecoderCache | None = None,
        output_attentions: bool | None = False,
    ) -> torch.Tensor:
        read = self._before(self.self_attention_layer_norm, hidden_states)
        attended, _ = self.self_attention(read, attention_mask, cache, output_attentions)
        hidden_states = self._after(self.self_attention_layer_norm, hidden_states, attended)

        read = self._before(self.cross_attention_layer_norm, hidden_states)
        attended, _ = self.cross_attention(
            read, encoder_hidden_states, encoder_attention_mask, cache, output_attentions
        )
        hidden_states = self._after(self.cross_attention_layer_norm, hidden_states, attended)
        return self._feed_forward(hidden_states)


class AdaptiveSparseSeq2SeqPreTrainedModel(AdaptiveSparsePreTrainedModel):
    """Loading, saving and initialisation, shared by all encoder-decoder models."""

    config: AdaptiveSparseSeq2SeqConfig  # type: ignore[assignment]
    _no_split_modules = [
        "AdaptiveSparseSeq2SeqEmbeddings",
        "AdaptiveSparseSeq2SeqEncoderLayer",
        "AdaptiveSparseSeq2SeqDecoderLayer",
    ]
    _skip_keys_device_placement = [CACHE]
    _can_record_outputs = {}

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, AdaptiveSparseForConditionalGeneration):
            init.zeros_(module.final_logits_bias)

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """Resizes every vocabulary as in Transformers; new tokens have no logit bias."""
        embeddings = super().resize_token_embeddings(
            new_num_tokens, pad_to_multiple_of, mean_resizing
        )
        decoder = getattr(self.base_model, "decoder", None)
        if decoder is not None and not self.config.tie_word_embeddings:
            decoder.resize_token_embeddings(embeddings.weight.shape[0], None, mean_resizing)
        if isinstance(self, AdaptiveSparseForConditionalGeneration):
            more = embeddings.weight.shape[0] - self.final_logits_bias.shape[1]
            self.final_logits_bias = F.pad(self.final_logits_bias, (0, more))
        return embeddings


class AdaptiveSparseSeq2SeqEncoder(AdaptiveSparseSeq2SeqPreTrainedModel):
    """Reads the document.

    Args:
        config: the configuration; it is not changed.
        head: the head around it ("ForQuestionAnswering"), by which its default global tokens go.
    """

    _can_record_outputs = {
        "hidden_states": AdaptiveSparseSeq2SeqEncoderLayer,
        "attentions": AdaptiveSparseAttention,
    }

    def __init__(self, config: AdaptiveSparseSeq2SeqConfig, head: str = "") -> None:
        super().__init__(config)
        self.embeddings = AdaptiveSparseSeq2SeqEmbeddings(
            config, config.max_encoder_position_embeddings
        )
        self.layers = nn.ModuleList(
            AdaptiveSparseSeq2SeqEncoderLayer(config, layer_idx)
            for layer_idx in range(config.encoder_layers)
        )
        is_pre_norm = config.norm_style == "pre"
        self.final_layer_norm = nn.LayerNorm(config.d_model) if is_pre_norm else None
        self.head = head
        self.random_step = RandomStep(config)
        self.gradient_checkpointing = False
        self.post_init()

    # No **kwargs: generate() passes what the signature names, and Seq2SeqTrainer gives it labels.
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        global_attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        validate: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutput:
        """Encodes a batch of documents of any length up to `config.max_sequence_length`; the
        arguments are those of `AdaptiveSparseSeq2SeqModel.forward`.

        Returns:
            last_hidden_state [batch, length, d_model], and on request hidden_states and attentions.
        """
        config = self.config
        _, length = check_inputs(config, input_ids, inputs_embeds, validate)
        check_length(length, config.max_sequence_length)
        if (
            global_attention_mask is None
            and config.default_global_tokens == "none"
            and config.separate_global_projections
            and not torch.compiler.is_compiling()  # which would break its graph for a warning
        ):
            logger.warning_once(FORGOTTEN_GLOBAL_MASK)

        hidden_states = self.embeddings(input_ids, inputs_embeds)
        masks = encoder_masks(
            config,
            hidden_states,
            attention_mask,
            global_attention_mask,
            validate,
            head=self.head,
            input_ids=input_ids,
        )
        hidden_states = self._encode(hidden_states, masks, output_attentions, validate)
        if self.final_layer_norm is not None:
            hidden_states = self.final_layer_norm(hidden_states)
        return BaseModelOutput(last_hidden_state=hidden_states)


class AdaptiveSparseSeq2SeqDecoder(AdaptiveSparseSeq2SeqPreTrainedModel):
    """Writes a text about the document, one token after the other."""

    _can_record_outputs = {
        "hidden_states": AdaptiveSparseSeq2SeqDecoderLayer,
        "attentions": DecoderSelfAttention,
        "cross_attentions": DecoderCrossAttention,
    }

    def __init__(self, config: AdaptiveSparseSeq2SeqConfig) -> None:
        super().__init__(config)
        self.embeddings = AdaptiveSparseSeq2SeqEmbeddings(
            config, config.max_decoder_position_embeddings
        )
        self.layers = nn.ModuleList(
            AdaptiveSparseSeq2SeqDecoderLayer(config, layer_idx)
            for layer_idx in range(config.decoder_layers)
        )
        is_pre_norm = config.norm_style == "pre"
        self.final_layer_norm = nn.LayerNorm(config.d_model) if is_pre_norm else None
        self.gradient_checkpointing = False
        self.post_init()

    @takes_cache
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        validate: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Decodes a batch of texts, or the tokens that follow those in the cache; other arguments
        are the decoder's of `AdaptiveSparseSeq2SeqModel.forward`.

        Args:
            encoder_hidden_states: [documents, document_length, d_model]; several texts about one
                document are neighbours in the batch.
            encoder_attention_mask: [documents, document_length], 1 for tokens, 0 for padding.

        Returns:
            last_hidden_state [batch, length, d_model], the cache, and on request hidden_states,
            attentions and cross_attentions.

        Raises:
            ValueError: an argument has a wrong shape, type or value, or the text is too long.
        """
        shape = check_inputs(self.config, input_ids, inputs_embeds, validate, prefix="decoder_")
        if encoder_hidden_states is None:
            raise ValueError("encoder_hidden_states is None, the encoded document is needed")
        num_documents = encoder_hidden_states.shape[0]
        if shape[0] % max(1, num_documents) or (shape[0] and not num_documents):
            raise ValueError(
                f"decoder_input_ids has {shape[0]} sequences, a multiple of the number of "
                f"documents = {num_documents} is needed"
            )
        document_shape = (num_documents, encoder_hidden_states.shape[1])
        encoder_mask = boolean_mask(
            "attention_mask", encoder_attention_mask, document_shape, validate
        )
        cache = self._cache(cache, use_cache)
        tokens = input_ids if input_ids is not None else inputs_embeds
        assert tokens is not None
        device = tokens.device
        new = new_tokens(
            cache, attention_mask, shape, device, validate, name="decoder_attention_mask"
        )
        longest = self.config.max_decoder_position_embeddings
        if new.total is not None and new.total > longest:
            raise ValueError(
                f"the decoder is given {new.total} tokens, at most "
                f"config.max_decoder_position_embeddings = {longest} are allowed"
            )
        hidden_states = self.embeddings(input_ids, inputs_embeds, new.slots)
        mask = causal_mask(new)
        encoder_mask = effective_mask(encoder_mask, device)
        if encoder_mask is not None:
            encoder_mask = encoder_mask[:, None, None, :]
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        for layer in self.layers:
            hidden_states = layer(
                hidden_states, mask, encoder_hidden_states, encoder_mask, cache,
                output_attentions,
            )  # fmt: skip
        if self.final_layer_norm is not None:
            hidden_states = self.final_layer_norm(hidden_states)
        named: dict[str, Any] = {CACHE: cache}
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_states, **named)

    def _cache(
        self, cache: EncoderDecoderCache | None, use_cache: bool | None
    ) -> EncoderDecoderCache | None:
        """The cache to use: the caller's, a new one, or none."""
        if not self._may_cache(cache):
            return None
        if cache is None:
            use_cache = self.config.use_cache if use_cache is None else use_cache
            return EncoderDecoderCache(DynamicCache(), DynamicCache()) if use_cache else None
        if not isinstance(cache, EncoderDecoderCache):
            raise ValueError(
                f"cache is a {type(cache).__name__}, a transformers.EncoderDecoderCache is needed"
            )
        return cache


class AdaptiveSparseSeq2SeqModel(AdaptiveSparseSeq2SeqPreTrainedModel):
    """Encoder and decoder.

    Args:
        config: the configuration; it is not changed.
        head: the head around it ("ForQuestionAnswering"), by which its default global tokens go.
    """

    _tied_weights_keys = {
        "decoder.embeddings.word_embeddings.weight": "encoder.embeddings.word_embeddings.weight"
    }

    def __init__(self, config: AdaptiveSparseSeq2SeqConfig, head: str = "") -> None:
        config.validate_adaptive_sparse_seq2seq()  # values may have been set since its construction
        super().__init__(config)
        self.encoder = AdaptiveSparseSeq2SeqEncoder(config, head)
        self.decoder = AdaptiveSparseSeq2SeqDecoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.encoder.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.encoder.embeddings.word_embeddings = value
        if self.config.tie_word_embeddings:
            self.decoder.embeddings.word_embeddings = value

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: ModelOutput | tuple[Any, ...] | None = None,
        global_attention_mask: torch.Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        validate: bool = False,
        **kwargs: Unpack[OutputArguments],
    ) -> Seq2SeqModelOutput:
        """Encodes documents and decodes texts about them.

        Args:
            input_ids: [batch, length] token ids of the document; or `inputs_embeds`.
            attention_mask: [batch, length], 1 for tokens, 0 for padding. None: no padding.
            decoder_input_ids: [batch, target_length]; or `decoder_inputs_embeds`. If both are None,
                the document itself, shifted by one (as BART does).
            decoder_attention_mask: [batch, target_length], 1 for tokens, 0 for padding, cached
                tokens included.
            encoder_outputs: what the encoder returned for the document, to not encode it again.
            global_attention_mask: [batch, length], 1 for tokens that attend to all tokens and that
                all attend to. None: `config.default_global_tokens`.
            cache: the decoder's cache; give it only the tokens that come after. Not used in
                training with gradient checkpointing. `past_key_values`, as older Transformers calls
                it, is the same.
            inputs_embeds: [batch, length, d_model] in place of the document's word embeddings.
            decoder_inputs_embeds: [batch, target_length, d_model].
            use_cache: whether to return the decoder's cache; None: `config.use_cache`.
            validate: see `AdaptiveSparseModel.forward`.
            kwargs: `output_attentions`, `output_hidden_states`, `return_dict`.

        Returns:
            last_hidden_state [batch, target_length, d_model], the cache, encoder_last_hidden_state
            [batch, length, d_model], and on request the hidden states, attentions and
            cross-attentions of both.

        Raises:
            ValueError: an argument has a wrong shape, type or value, an input is too long, or there
                is nothing to decode.
        """
        check_extra_arguments(kwargs, OutputArguments.__annotations__)
        asked = {name: kwargs.get(name) for name in ("output_attentions", "output_hidden_states")}
        also = {name: value for name, value in asked.items() if value is not None}
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self._shifted_document(input_ids)
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids, attention_mask, global_attention_mask, inputs_embeds, validate,
                return_dict=True, **also,
            )  # fmt: skip
        elif not isinstance(encoder_outputs, ModelOutput):
            encoder_outputs = BaseModelOutput(*encoder_outputs)
        assert isinstance(encoder_outputs, ModelOutput)
        decoder_outputs = self.decoder(
            decoder_input_ids, decoder_attention_mask, encoder_outputs[0], attention_mask,
            cache, decoder_inputs_embeds, use_cache, validate, return_dict=True, **also,
        )  # fmt: skip
        return Seq2SeqModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs[0],
            encoder_hidden_states=encoder_outputs.get("hidden_states"),
            encoder_attentions=encoder_outputs.get("attentions"),
            **{CACHE: decoder_outputs.get(CACHE)},
        )

    def _shifted_document(self, input_ids: torch.Tensor | None) -> torch.Tensor:
        """What the decoder reads if it is given nothing, as in BART."""
        missing = "neither of decoder_input_ids and decoder_inputs_embeds was given, and "
        if input_ids is None:
            raise ValueError(
                f"{missing}there are no input_ids or labels to make them from: give "
                "decoder_input_ids"
            )
        longest = self.config.max_decoder_position_embeddings
        if input_ids.shape[-1] > longest:
            raise ValueError(
                f"{missing}the document's {input_ids.shape[-1]} tokens cannot take their place: "
                f"the decoder reads at most config.max_decoder_position_embeddings = {longest}. "
                "Give decoder_input_ids or labels"
            )
        return shift_tokens_right(
            input_ids, cast(Any, self.config.pad_token_id), self.config.decoder_start_token_id
        )


class AdaptiveSparseForConditionalGeneration(AdaptiveSparseSeq2SeqPreTrainedModel, GenerationMixin):
    """Encoder and decoder with a language head, for summaries and other texts about a document.

    torch.compile makes one graph of a whole training step, of `get_encoder()`, and of a decoding
    step, whose cache may grow or be of a fixed size.
    """

    create_masks_for_generate = staticmethod(padded_mask)

    _tied_weights_keys = {"lm_head.weight": "model.encoder.embeddings.word_embeddings.weight"}
    _keys_to_ignore_on_load_missing = [
        "final_logits_bias",
        *(AdaptiveSparsePreTrainedModel._keys_to_ignore_on_load_missing or ()),
    ]
    accepts_loss_kwargs = True

    def __init__(self, config: AdaptiveSparseSeq2SeqConfig) -> None:
        super().__init__(config)
        self.model = AdaptiveSparseSeq2SeqModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.register_buffer("final_logits_bias", torch.zeros(1, config.vocab_size))
        self.post_init()

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """The decoder's input for labels [batch, target_length], which data collators ask for."""
        return shift_tokens_right(
            labels, cast(Any, self.config.pad_token_id), self.config.decoder_start_token_id
        )

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: ModelOutput | tuple[Any, ...] | None = None,
        global_attention_mask: torch.Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        validate: bool = False,
        **kwargs: Unpack[OutputArguments],
    ) -> Seq2SeqLMOutput:
        """Predicts texts; the other arguments are those of `AdaptiveSparseSeq2SeqModel.forward`.

        Args:
            labels: [batch, target_length] token ids; -100 is ignored. Without decoder inputs these
                are made from the labels. Nothing is cached.

        Returns:
            logits [batch, target_length, vocab_size], and the loss if there are labels.
        """
        if labels is not None:
            use_cache = False
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        outputs = self.model(
            input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, encoder_outputs,
            global_attention_mask, cache, inputs_embeds, decoder_inputs_embeds, use_cache,
            validate, **returning_a_dict(kwargs),
        )  # fmt: skip
        logits = self.lm_head(outputs.last_hidden_state) + self.final_logits_bias
        num_items = kwargs.get("num_items_in_batch")
        loss = self.head_loss(token_loss, logits, labels, num_items)
        return Seq2SeqLMOutput(loss=loss, logits=logits, **beside_the_head(outputs))

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.Tensor | None, dict[str, Any]]:
        """Repeats what the decoder reads for every beam, but not the document.

        But that too where something listens before a projection of the cross-attention is called:
        PEFT's `adapter_names` have a name for every text.
        """
        names = ("encoder_outputs", "attention_mask", "global_attention_mask")
        document = {}
        if not self._is_watched():
            document = {name: model_kwargs.pop(name) for name in names if name in model_kwargs}
            is_encoder_decoder = False
        # Transformers asks for attributes in `self` that not even its own models have.
        expanded = cast(Any, super())._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return expanded[0], {**expanded[1], **document}

    def _is_watched(self) -> bool:
        layers = cast(Any, self.model.decoder.layers)
        modules = [module for layer in layers for module in layer.cross_attention.children()]
        return any(module._forward_pre_hooks for module in modules)

    def _reorder_cache(
        self, cache: EncoderDecoderCache, beam_idx: torch.LongTensor
    ) -> EncoderDecoderCache:
        """Lets the texts so far follow their beams; all beams read the same document."""
        cache.self_attention_cache.reorder_cache(beam_idx)
        return cache

    def _validate_generated_length(self, generation_config, *args, **kwargs) -> None:
        """Refuses at the start of generate() what would fail at its end."""
        cast(Any, super())._validate_generated_length(generation_config, *args, **kwargs)
        # The last token is written, but not read again.
        longest = self.config.max_decoder_position_embeddings + 1
        if generation_config.max_length > longest:
            raise ValueError(
                f"generate: a text of up to {generation_config.max_length} tokens is asked for, at "
                f"most config.max_decoder_position_embeddings + 1 = {longest} are allowed, start "
                "token included: give a smaller max_new_tokens or max_length"
            )


class AdaptiveSparseSeq2SeqForQuestionAnswering(AdaptiveSparseSeq2SeqPreTrainedModel):
    """Encoder and decoder with a head that scores tokens as the start and the end of the answer.

    The decoder reads question and document once more; by default the question's tokens are global.
    """

    accepts_loss_kwargs = False

    def __init__(self, config: AdaptiveSparseSeq2SeqConfig) -> None:
        super().__init__(config)
        self.model = AdaptiveSparseSeq2SeqModel(config, head="ForQuestionAnswering")
        self.qa_outputs = nn.Linear(config.d_model, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: ModelOutput | tuple[Any, ...] | None = None,
        global_attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        use_cache: bool = False,
        validate: bool = False,
        **kwargs: Unpack[OutputArguments],
    ) -> Seq2SeqQuestionAnsweringModelOutput:
        """Finds answers; the other arguments are those of `AdaptiveSparseSeq2SeqModel.forward`.

        Args:
            start_positions, end_positions: [batch] slots of the answer in the decoder's input;
                those beyond it are ignored.

        Returns:
            start_logits and end_logits [batch, target_length], and the loss if both positions are
            given.
        """
        outputs = self.model(
            input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, encoder_outputs,
            global_attention_mask, None, inputs_embeds, decoder_inputs_embeds, use_cache, validate,
            **returning_a_dict(kwargs),
        )  # fmt: skip
        logits = self.qa_outputs(outputs.last_hidden_state)
        start_logits, end_logits = logits.movedim(-1, 0).contiguous()
        return Seq2SeqQuestionAnsweringModelOutput(
            loss=self.head_loss(span_loss, logits, start_positions, end_positions),
            start_logits=start_logits,
            end_logits=end_logits,
            **beside_the_head(outputs),
        )


class AdaptiveSparseSeq2SeqForSequenceClassification(AdaptiveSparseSeq2SeqPreTrainedModel):
    """Encoder and decoder with a head that classifies documents.

    The decoder reads the document once more; the head reads its hidden state at the document's last
    end-of-sequence token.
    """

    accepts_loss_kwargs = False

    def __init__(self, config: AdaptiveSparseSeq2SeqConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = AdaptiveSparseSeq2SeqModel(config, head="ForSequenceClassification")
        assert config.num_labels is not None  # Transformers names two labels if nobody else does
        self.classifier = BartClassificationHead(
            config.d_model, config.d_model, config.num_labels, config.classifier_dropout
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: ModelOutput | tuple[Any, ...] | None = None,
        global_attention_mask: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool = False,
        validate: bool = False,
        **kwargs: Unpack[OutputArguments],
    ) -> Seq2SeqSequenceClassifierOutput:
        """Classifies documents; other arguments are those of `AdaptiveSparseSeq2SeqModel.forward`.

        Args:
            input_ids: [batch, length], at least one of them `config.eos_token_id` in every row;
                decoder inputs, if given, have the same length.
            labels: [batch] class numbers or regression targets, or [batch, num_labels] floats for
                several labels at once; see `config.problem_type`.

        Returns:
            logits [batch, num_labels], and the loss if there are labels.

        Raises:
            ValueError: there are no input_ids, or no end-of-sequence token in one of them; or see
                `AdaptiveSparseSeq2SeqModel.forward`.
        """
        if input_ids is None:
            raise ValueError(
                "input_ids is None, the document's token ids are needed to find its last "
                "end-of-sequence token"
            )
        outputs = self.model(
            input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, encoder_outputs,
            global_attention_mask, None, None, decoder_inputs_embeds, use_cache, validate,
            **returning_a_dict(kwargs),
        )  # fmt: skip
        logits = self.classifier(self._last_end(outputs.last_hidden_state, input_ids, validate))
        loss = self.head_loss(classification_loss, logits, labels, self.config.problem_type)
        return Seq2SeqSequenceClassifierOutput(loss=loss, logits=logits, **beside_the_head(outputs))

    def _last_end(
        self, hidden_states: torch.Tensor, input_ids: torch.Tensor, validate: bool
    ) -> torch.Tensor:
        """The hidden state at the last end-of-sequence token: [batch, d_model]."""
        length = input_ids.shape[1]
        if hidden_states.shape[1] != length:
            raise ValueError(
                f"decoder_input_ids has {hidden_states.shape[1]} tokens per sequence, the length "
                f"of input_ids = {length} is needed: the head reads the slot of the last "
                "end-of-sequence token"
            )
        ends = torch.as_tensor(self.config.eos_token_id, device=input_ids.device)
        is_end = torch.isin(input_ids, ends).to(hidden_states.device)
        if (validate or may_look(input_ids)) and not is_end.any(dim=1).all():
            row = int((~is_end.any(dim=1)).nonzero()[0])
            raise ValueError(
                f"input_ids has no end-of-sequence token in row {row}, config.eos_token_id = "
                f"{self.config.eos_token_id} is needed in every row"
            )
        slots = torch.arange(1, length + 1, device=hidden_states.device)
        index = (is_end * slots).argmax(dim=1)
        return hidden_states.take_along_dim(index[:, None, None], dim=1).squeeze(1)


__all__ = [
    "AdaptiveSparseForConditionalGeneration",
    "AdaptiveSparseSeq2SeqForQuestionAnswering",
    "AdaptiveSparseSeq2SeqForSequenceClassification",
    "AdaptiveSparseSeq2SeqModel",
    "AdaptiveSparseSeq2SeqPreTrainedModel",
]
