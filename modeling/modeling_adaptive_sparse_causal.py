"""The adaptive_sparse decoder and its language modelling head.

The parameters have the names and shapes of the encoder with its masked language modelling head, so
that each loads the checkpoints of the other.
"""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs
from typing_extensions import Unpack

from adaptive_longformer.attention.padding import may_look
from adaptive_longformer.configuration.configuration_adaptive_sparse import AdaptiveSparseConfig
from adaptive_longformer.modeling.adaptive_selection import SelectionState
from adaptive_longformer.modeling.cache_name import CACHE, takes_cache
from adaptive_longformer.modeling.causal.attention import CausalSparseAttention, causal_masks
from adaptive_longformer.modeling.causal.cache import causal_cache
from adaptive_longformer.modeling.input_checks import (
    check_extra_arguments,
    check_inputs,
    check_length,
)
from adaptive_longformer.modeling.losses import next_token_loss, token_loss
from adaptive_longformer.modeling.modeling_adaptive_sparse import (
    AdaptiveSparseEmbeddings,
    AdaptiveSparseLanguageModel,
    AdaptiveSparseLayer,
    AdaptiveSparseLMHead,
    AdaptiveSparsePreTrainedModel,
    OutputArguments,
    beside_the_head,
    returning_a_dict,
)
from adaptive_longformer.modeling.new_tokens import NewTokens, new_tokens, padded_mask
from adaptive_longformer.modeling.padding import LayerMasks, left_padding

SELECTING_CACHE_IMPLEMENTATIONS = (None, "dynamic")

# What a token sees must not depend on how many tokens follow it.
CAUSAL_PATTERNS = ("longformer", "sliding_window", "full", "strided", "fixed", "adaptive")


class AdaptiveSparseCausalLayer(AdaptiveSparseLayer):
    """One post-norm Transformer layer whose tokens see only earlier ones."""

    def __init__(self, config: AdaptiveSparseConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.attention = CausalSparseAttention(config, layer_idx)

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
    ) -> torch.Tensor:
        attended, _ = self.attention(
            hidden_states, attention_mask, sink_rank, output_attentions, slots, first_slots,
            selection_state, cache,
        )  # fmt: skip
        return self.after_attention(attended, hidden_states)


class AdaptiveSparseCausalModel(AdaptiveSparsePreTrainedModel):
    """The decoder: a token sees earlier ones in the pattern of the configuration, and the sinks.

    Of `config.attention_window` the half before a token counts. With the patterns "longformer",
    "adaptive", "strided" and "fixed" the first `config.num_sink_tokens` tokens that are not padding
    are seen by all later ones.

    With "adaptive" and a selection strength above 0 every block of queries also reads earlier
    blocks, chosen by the queries of the block before: its own would tell its first tokens about its
    last ones. The cache then keeps all keys and values, but a new token reads only the window, the
    sinks and the list of its block. That list is made when the block begins, once in
    `config.query_block_size` tokens, from the means of all kept keys and the keys of candidates.

    Args:
        config: the configuration; it is not changed.

    Raises:
        ValueError: the pattern is none for a causal model, or has separate global projections or
            learned global blocks.
    """

    _can_record_outputs = {
        "hidden_states": AdaptiveSparseCausalLayer,
        "attentions": CausalSparseAttention,
    }

    def __init__(self, config: AdaptiveSparseConfig) -> None:
        config.validate_adaptive_sparse()  # values may have been set after its construction
        if config.attention_pattern not in CAUSAL_PATTERNS:
            raise ValueError(
                f"attention_pattern is {config.attention_pattern!r}, allowed in a causal model are "
                f"{', '.join(map(repr, CAUSAL_PATTERNS))}"
            )
        if config.separate_global_projections:
            raise ValueError(
                "separate_global_projections is True, a causal model has none: load it with "
                "separate_global_projections=False"
            )
        if config.attention_pattern == "adaptive" and config.num_learned_global_blocks:
            raise ValueError(
                f"num_learned_global_blocks is {config.num_learned_global_blocks}, 0 is needed in "
                "a causal model: blocks that all tokens read would tell the first about the last"
            )
        super().__init__(config)
        self.embeddings = AdaptiveSparseEmbeddings(config)
        self.layers = nn.ModuleList(
            AdaptiveSparseCausalLayer(config, layer_idx)
            for layer_idx in range(config.num_hidden_layers)
        )
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def is_selecting(self) -> bool:
        """Whether tokens read blocks that they choose: "adaptive" at a strength above 0."""
        return any(layer.attention.is_selecting for layer in self.layers)  # type: ignore[union-attr]

    @takes_cache
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        validate: bool = False,
        **kwargs: Unpack[OutputArguments],
    ) -> BaseModelOutputWithPast:
        """Decodes a batch of sequences, or continues one.

        Args:
            input_ids: [batch, length] ids of the new tokens; or give `inputs_embeds`.
            attention_mask: [batch, cached + length], 1 for tokens, 0 for padding on either side.
                None: no padding.
            token_type_ids: [batch, length] segment numbers.
            position_ids: [batch, length] rows of the position table. None: tokens are counted
                without padding, whatever `config.position_style` says about slots.
            inputs_embeds: [batch, length, hidden_size] in place of the word embeddings.
            cache: the keys and values of earlier tokens; the new ones are added, unless gradient
                checkpointing is at work. None: a cache is made as needed, see `causal_cache`.
                `past_key_values`, as older Transformers calls it, is the same.
            use_cache: whether to make a cache if none is given; None: `config.use_cache`, never in
                training.
            validate: see `AdaptiveSparseModel.forward`.
            kwargs: `output_attentions`, `output_hidden_states`, `return_dict`.

        Returns:
            last_hidden_state [batch, length, hidden_size], the cache or None, and on request
            hidden_states and attentions (after cached tokens, of what the cache has kept).

        Raises:
            ValueError: an argument has a wrong shape, type or value, the sequence is longer than
                the position table, or the cache is none for the chosen blocks.
        """
        check_extra_arguments(kwargs, OutputArguments.__annotations__)
        batch_size, length = check_inputs(
            self.config, input_ids, inputs_embeds, validate, token_type_ids=token_type_ids,
            position_ids=position_ids,
        )  # fmt: skip
        tokens = input_ids if input_ids is not None else inputs_embeds
        assert tokens is not None
        new = new_tokens(cache, attention_mask, (batch_size, length), tokens.device, validate)
        is_first = new.total == length
        if is_first:  # they read no cache
            mask = None if new.mask is None else new.mask[:, :length]
            new = new._replace(num_keys=length, mask=mask)
        if position_ids is None:
            position_ids = self._position_ids(new)
        hidden_states = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        sink_rank = self._sink_rank(new, batch_size)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if not self._may_cache(cache):
            cache = None
        elif use_cache and cache is None:
            cache = causal_cache(self.config, self.is_selecting)
        first_slots = left_padding(new.mask) if self.is_selecting else None
        masks: torch.Tensor | LayerMasks | None = new.mask
        if is_first:
            num_sinks = self.config.num_sink_tokens
            masks = causal_masks(new.mask, sink_rank, first_slots, num_sinks, length)
        elif first_slots is not None:
            first_slots = first_slots.cpu()
        output_attentions = kwargs.get("output_attentions", self.config.output_attentions)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states, masks, sink_rank, output_attentions,
                None if is_first else new.slots, first_slots, self._selection_state(validate),
                cache,
            )  # fmt: skip
        named: dict[str, Any] = {CACHE: cache}
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **named)

    def _position_ids(self, new: NewTokens) -> torch.Tensor:
        """Rows of the position table of the new tokens: [batch or 1, length]."""
        longest, index = new.total, new.slots[None]
        if new.mask is not None:
            if may_look(new.mask):
                longest = int(new.mask.sum(dim=1).max())
            index = (new.mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, new.slots]
        if longest is not None:
            check_length(longest, self.config.max_sequence_length)
        return index + self.config.position_offset

    def _sink_rank(self, new: NewTokens, batch_size: int) -> torch.Tensor | None:
        """The how-manieth sink every token is, int64 [batch, keys]; None if there are none."""
        num_sinks = self.config.num_sink_tokens
        if num_sinks == 0 or not self.config.uses_global_tokens:
            return None
        if new.mask is None:
            rank = torch.arange(new.num_keys, device=new.slots.device).expand(batch_size, -1)
        else:
            rank = (new.mask.long().cumsum(dim=1) - 1).masked_fill(~new.mask, num_sinks)
        return rank.clamp(max=num_sinks)


class CausalArguments(OutputArguments, total=False):
    """What the model with a head also takes. (Trainer looks for labels in signatures.)

    Attributes:
        shift_labels: [batch, length] the next tokens' ids, where they are not those that follow in
            the input, as in context parallelism; in place of labels.
    """

    shift_labels: torch.Tensor | None


class AdaptiveSparseForCausalLM(AdaptiveSparseLanguageModel, GenerationMixin):
    """The decoder with a language modelling head; `generate()` continues texts.

    Layers with a sliding window cache only what can still be seen; for generation that takes tokens
    back, such as with an assistant model, everything is cached. Layers that choose blocks cache
    everything, and read only what they choose.
    """

    _no_split_modules = ["AdaptiveSparseEmbeddings", "AdaptiveSparseCausalLayer"]
    create_masks_for_generate = staticmethod(padded_mask)

    def __init__(self, config: AdaptiveSparseConfig) -> None:
        super().__init__(config)
        # Layers that choose blocks keep a list of them, which is made on the host.
        self._can_compile_fullgraph = config.attention_pattern != "adaptive"
        self.model = AdaptiveSparseCausalModel(config)
        self.lm_head = AdaptiveSparseLMHead(config)
        self.post_init()

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        validate: bool = False,
        **kwargs: Unpack[CausalArguments],
    ) -> CausalLMOutputWithPast:
        """Predicts next tokens; the other arguments are those of the decoder's forward.

        Args:
            labels: [batch, length] token ids, as `input_ids`: the shift by one is done here; -100
                is ignored.
            logits_to_keep: compute logits of the last so many tokens only; 0: of all.

        Returns:
            logits [batch, length or logits_to_keep, vocab_size], the cache, and the loss if there
            are labels.

        Raises:
            ValueError: both labels and logits_to_keep are given, or see
                `AdaptiveSparseCausalModel.forward`.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        if logits_to_keep and not (labels is None and shift_labels is None):
            raise ValueError(
                f"logits_to_keep is {logits_to_keep}, 0 is needed with labels: the loss reads all"
            )
        outputs = self.model(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
            cache, use_cache, validate, **returning_a_dict(kwargs),
        )  # fmt: skip
        logits = self.lm_head(outputs.last_hidden_state[:, -logits_to_keep:])
        num_items = kwargs.get("num_items_in_batch")
        if shift_labels is None:
            loss = self.head_loss(next_token_loss, logits, labels, num_items)
        else:
            loss = self.head_loss(token_loss, logits, shift_labels, num_items)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **beside_the_head(outputs))

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, *args, inputs_embeds: torch.Tensor | None = None, **kwargs
    ) -> dict:
        """The inputs of one step, as Transformers prepares them, without its position ids.

        Those count from 0; ours are rows of a table whose first rows may be reserved.
        """
        inputs = super().prepare_inputs_for_generation(  # type: ignore[attr-defined]
            input_ids, *args, inputs_embeds=inputs_embeds, **kwargs
        )
        for name in ("position_ids", "cache_position"):
            inputs.pop(name, None)
        return inputs

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, *args, **kwargs
    ):
        """Gives `generate()` our cache where it would make a DynamicCache."""
        is_selecting, kind = self.model.is_selecting, generation_config.cache_implementation
        if is_selecting and kind not in SELECTING_CACHE_IMPLEMENTATIONS:
            raise ValueError(
                f"cache_implementation is {kind!r}, where layers choose blocks allowed are "
                f"{', '.join(map(repr, SELECTING_CACHE_IMPLEMENTATIONS))}"
            )
        is_assisted = generation_mode == GenerationMode.ASSISTED_GENERATION
        takes_back = is_assisted or generation_config.is_assistant
        has_cache = model_kwargs.get(CACHE) is not None
        makes_ours = is_selecting or (kind is None and not takes_back)
        if makes_ours and not has_cache and generation_config.use_cache is not False:
            model_kwargs[CACHE] = causal_cache(self.config, is_selecting)
            return None
        return super()._prepare_cache_for_generation(  # type: ignore[attr-defined]
            generation_config, model_kwargs, generation_mode, *args, **kwargs
        )


__all__ = ["AdaptiveSparseCausalModel", "AdaptiveSparseForCausalLM"]
