"""The adaptive_sparse encoder and its task heads.

Hidden states are [batch, length, hidden_size] everywhere.
"""

import os
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import logging
from transformers.utils.generic import ModelOutput, can_return_tuple
from transformers.utils.output_capturing import capture_outputs
from typing_extensions import TypedDict, Unpack

from adaptive_longformer.baselines.layers import WindowLinearAttention
from adaptive_longformer.configuration.configuration_adaptive_sparse import (
    SELECTING_PATTERNS,
    AdaptiveSparseConfig,
)
from adaptive_longformer.modeling.adaptive_selection import (
    AdaptiveSelection,
    SelectionState,
    selections,
    set_selection_strength,
)
from adaptive_longformer.modeling.attention_layer import (
    NOTHING_TO_SELECT_WITH,
    AdaptiveSparseAttention,
    layer_masks,
)
from adaptive_longformer.modeling.default_global_tokens import (
    encoder_masks,
    mask_question,
    question_of_length,
    question_tokens,
)
from adaptive_longformer.modeling.head_budgets import density_loss, match_configuration
from adaptive_longformer.modeling.input_checks import (
    check_choices,
    check_extra_arguments,
    check_inputs,
    check_length,
    check_tokens,
    check_types,
)
from adaptive_longformer.modeling.losses import (
    choice_loss,
    classification_loss,
    next_token_loss,
    span_loss,
    token_loss,
)
from adaptive_longformer.modeling.padding import LayerMasks, first_valid_token

logger = logging.get_logger(__name__)

NOTHING_IS_SELECTED = (
    "a model that can select blocks is trained with a selection_strength of 0: it selects none and "
    "learns nothing about them. Give the Trainer a SelectionRampCallback, or call "
    "model.set_selection_strength(1.0)"
)


class OutputArguments(TypedDict, total=False):
    """What every forward also takes.

    Attributes:
        output_attentions: also return the attention probabilities of every layer.
        output_hidden_states: also return the hidden states before and after every layer.
        return_dict: False for a plain tuple.
        num_items_in_batch: what Trainer passes to heads with `accepts_loss_kwargs`.
    """

    output_attentions: bool | None
    output_hidden_states: bool | None
    return_dict: bool | None
    num_items_in_batch: torch.Tensor | int | None


def returning_a_dict(kwargs: Any) -> Any:
    """The arguments of a model below a head, which reads names whatever the caller is given."""
    return {**kwargs, "return_dict": True}


def beside_the_head(outputs: ModelOutput) -> dict[str, Any]:
    """What a head returns of the model below it, unchanged."""
    read = ("last_hidden_state", "pooler_output")
    return {name: value for name, value in outputs.items() if name not in read}


class AdaptiveSparseEmbeddings(nn.Module):
    """The sum of word, position and token type embeddings, normalised."""

    def __init__(self, config: AdaptiveSparseConfig) -> None:
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.position_embeddings = nn.Embedding(
            config.max_position_embeddings,
            config.hidden_size,
            padding_idx=config.pad_token_id if config.position_style == "roberta" else None,
        )
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.scale = config.hidden_size**0.5 if config.rescale_embeddings else 1.0
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
    ) -> torch.Tensor:
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if self.scale != 1.0:
            words = words * self.scale
        if position_ids is None:
            position_ids = self._position_ids(input_ids, words)
        if token_type_ids is None:
            token_type_ids = position_ids.new_zeros(1, 1)
        embeddings = words + self.position_embeddings(position_ids)
        embeddings = embeddings + self.token_type_embeddings(token_type_ids)
        return self.dropout(self.layer_norm(embeddings))

    def _position_ids(self, input_ids: torch.Tensor | None, words: torch.Tensor) -> torch.Tensor:
        """Rows of the position table, [batch or 1, length].

        RoBERTa's style gives padding the row pad_token_id and counts the other tokens from there;
        embeddings show no padding, so that with them every slot counts.
        """
        if self.config.position_style == "roberta" and input_ids is not None:
            is_token = (input_ids != self.config.pad_token_id).long()
            return is_token.cumsum(dim=1) * is_token + (self.config.position_offset - 1)
        slots = torch.arange(words.shape[1], device=words.device)
        return (slots + self.config.position_offset)[None]


class AdaptiveSparseLayer(GradientCheckpointingLayer):
    """One post-norm Transformer layer."""

    def __init__(self, config: AdaptiveSparseConfig, layer_idx: int) -> None:
        super().__init__()
        self.attention = AdaptiveSparseAttention(config, layer_idx)
        self.attention_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.intermediate = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.output = nn.Linear(config.intermediate_size, config.hidden_size)
        self.output_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.chunk_size = config.chunk_size_feed_forward

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | LayerMasks | None = None,
        global_mask: torch.Tensor | None = None,
        output_attentions: bool | None = False,
        random_step: torch.Tensor | None = None,
        selection_state: SelectionState | None = None,
    ) -> torch.Tensor:
        attended, _ = self.attention(
            hidden_states, attention_mask, global_mask, output_attentions, random_step,
            selection_state,
        )  # fmt: skip
        return self.after_attention(attended, hidden_states)

    def after_attention(self, attended: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """The residual sum with the attention's output, and the feed-forward layer."""
        hidden_states = self.attention_layer_norm(self.dropout(attended) + hidden_states)
        if not self.chunk_size:
            return self._feed_forward(hidden_states)
        chunks = hidden_states.split(self.chunk_size, dim=1)
        return torch.cat([self._feed_forward(chunk) for chunk in chunks], dim=1)

    def _feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        transformed = self.output(self.activation(self.intermediate(hidden_states)))
        return self.output_layer_norm(self.dropout(transformed) + hidden_states)


class AdaptiveSparsePooler(nn.Module):
    """A dense layer and tanh on the first token that is not padding."""

    def __init__(self, config: AdaptiveSparseConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        return torch.tanh(self.dense(first_valid_token(hidden_states, attention_mask)))


class RandomStep(nn.Module):
    """The training step that BigBird's random blocks are drawn for; nothing for other patterns.

    Saved with the weights, so that a training that resumes goes on drawing new blocks. A module of
    its own: no device map splits it, and weights of another pattern load strictly.
    """

    count: torch.Tensor | None

    def __init__(self, config: Any) -> None:
        super().__init__()
        draws = config.attention_pattern == "big_bird"
        self.register_buffer("count", torch.zeros((), dtype=torch.int64) if draws else None)

    def forward(self) -> torch.Tensor | None:
        """The number of this step: every forward in training mode is one.

        A copy, so that a layer that gradient checkpointing runs again sees the same number.
        """
        if self.count is None or not self.training:
            return None
        step = self.count.clone()
        self.count.add_(1)
        return step

    def _load_from_state_dict(
        self, state_dict, prefix, metadata, strict, missing, unexpected, errors
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, [], [], errors)


class AdaptiveSparsePreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation, shared by all models."""

    config: AdaptiveSparseConfig
    base_model_prefix = "model"
    _input_embed_layer = "word_embeddings"  # in `embeddings`
    supports_gradient_checkpointing = True
    _no_split_modules = ["AdaptiveSparseEmbeddings", "AdaptiveSparseLayer"]
    _can_compile_fullgraph = True
    # What the pooler or BigBird's training has left in a checkpoint may be missing or unused; a
    # checkpoint of another pattern becomes adaptive by its configuration alone.
    _keys_to_ignore_on_load_missing = [r"(^|\.)random_step\.", r"\.(adaptive|baseline)\."]
    _keys_to_ignore_on_load_unexpected = [r"(^|\.)random_step\.", r"(^|\.)pooler\."]
    _supports_context_parallel = False
    _can_record_outputs = {
        "hidden_states": AdaptiveSparseLayer,
        "attentions": AdaptiveSparseAttention,
    }

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Loads a model, as in Transformers.

        Raises:
            ValueError: the source is of another model_type; the message gives the command that
                converts it. (Transformers would load the weights whose names happen to fit and
                warn.)
        """
        saved = {}
        if pretrained_model_name_or_path is not None:
            saved = cls._saved_config(pretrained_model_name_or_path, kwargs)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        match_configuration(selections(model), saved)
        return loaded

    def load_adapter(self, *args, **kwargs) -> Any:
        """As in Transformers, but what an adapter has learned to select is never left out."""
        loaded = super().load_adapter(*args, **kwargs)
        saved = [getattr(adapter, "modules_to_save", None) for adapter in self.peft_config.values()]
        if any("adaptive" in (names or ()) for names in saved) and not selections(self):
            raise ValueError(f"the adapter has an adaptive part, but {NOTHING_TO_SELECT_WITH}")
        return loaded

    @classmethod
    def _saved_config(cls, source: str | os.PathLike, kwargs: dict) -> dict:
        """The configuration beside the weights; raises ValueError if it is of another type."""
        try:
            config, _ = PreTrainedConfig.get_config_dict(source, **kwargs)
        except OSError:
            # As in an adapter's folder; Transformers says what is missing.
            return {}
        assert cls.config_class is not None
        needed = cls.config_class.model_type
        model_type = config.get("model_type", needed)
        if model_type != needed:
            remedy = (
                "Take a class of that model_type, or an Auto class"
                if str(model_type).startswith("adaptive_sparse")
                else "Convert it first, then load TARGET:\n"
                f"    adaptive-longformer convert {source} TARGET"
            )
            raise ValueError(
                f"{cls.__name__} cannot load {str(source)!r}: its model_type is {model_type!r}, "
                f"{needed!r} is needed. {remedy}"
            )
        return config

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RandomStep) and module.count is not None:
            init.zeros_(module.count)
        if isinstance(module, AdaptiveSelection | WindowLinearAttention):
            module.reset_parameters()

    def _may_cache(self, cache: Cache | None) -> bool:
        """Whether layers may add to a cache: one that is run again for its gradients would add a
        second time.

        Raises:
            ValueError: such layers are given a cache with tokens, which they could not read.
        """
        if not (
            self.training
            and torch.is_grad_enabled()
            and getattr(self, "gradient_checkpointing", False)
        ):
            return True
        if cache is not None and (length := int(cache.get_seq_length())):
            raise ValueError(
                f"cache holds {length} tokens, none is allowed in training with gradient "
                "checkpointing: call under torch.no_grad(), or model.eval()"
            )
        return False

    set_selection_strength = set_selection_strength

    def head_loss(
        self, loss: Callable[..., torch.Tensor], logits: torch.Tensor, labels, *more: Any
    ) -> torch.Tensor | None:
        """`loss(logits, labels, *more)` and what `config.target_density` adds to it in training;
        None without labels.
        """
        if labels is None or (loss is span_loss and None in more):
            return None
        check_types({"labels": labels}, torch.Tensor, "a torch.Tensor")
        value, config = loss(logits, labels, *more), self.config
        if not self.training or config.attention_pattern not in SELECTING_PATTERNS:
            return value
        parts = selections(self)
        if not torch.compiler.is_compiling() and not parts[0].is_active:
            logger.warning_once(NOTHING_IS_SELECTED)
        if config.target_density is None:
            return value
        added = density_loss(parts, config.target_density)
        if loss in (token_loss, next_token_loss) and more[0] is not None:
            # By this batch's share of the tokens that a Trainer takes together for one step.
            counted = labels[:, 1:] if loss is next_token_loss else labels
            added = added * ((counted != -100).sum() / more[0])
        total = value + added
        parts[0].record_losses(value, total)
        return total

    def _encode(
        self,
        hidden_states: torch.Tensor,
        masks: tuple[torch.Tensor | None, torch.Tensor | None],
        output_attentions: bool | None,
        validate: bool,
    ) -> torch.Tensor:
        """The layers of an encoder, one after the other; `masks` as `encoder_masks` makes them."""
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        random_step = cast(RandomStep, self.random_step)()
        layers = cast(nn.ModuleList, self.layers)
        once = layer_masks([cast(Any, layer).attention for layer in layers], hidden_states, *masks)
        for layer in layers:
            state = self._selection_state(validate)
            hidden_states = layer(hidden_states, once, None, output_attentions, random_step, state)
        return hidden_states

    def _selection_state(self, validate: bool) -> SelectionState | None:
        """What one layer remembers of this forward pass; None if nothing is to be remembered."""
        if self.config.attention_pattern not in SELECTING_PATTERNS or torch.compiler.is_compiling():
            return None
        return SelectionState(validate)

    def get_correct_attn_implementation(
        self, requested_attention: str | None, is_init_check: bool = False
    ) -> str:
        """Always "eager", Transformers' name for attention that can return its probabilities.

        Raises:
            ValueError: another implementation is asked for. The backend of these models is chosen
                by `config.attention_backend`.
        """
        if requested_attention not in (None, "eager", "adaptive_sparse"):
            raise ValueError(
                f"attn_implementation is {requested_attention!r}, allowed are 'eager' and "
                f"'adaptive_sparse' (the same here). Choose how {type(self).__name__} computes by "
                "config.attention_backend"
            )
        return "eager"

    @property
    def supports_context_parallel(self) -> bool:
        """False: a shard of the sequence lacks the window and the global tokens of the others."""
        return False


class AdaptiveSparseModel(AdaptiveSparsePreTrainedModel):
    """The encoder, with or without a pooler.

    Args:
        config: the configuration; it is not changed.
        add_pooling_layer: whether to build the pooler.
        head: the head around it ("ForQuestionAnswering"), by which its default global tokens go.
    """

    def __init__(
        self,
        config: AdaptiveSparseConfig,
        add_pooling_layer: bool = True,
        head: str = "",
    ) -> None:
        config.validate_adaptive_sparse()  # values may have been set after its construction
        super().__init__(config)
        self.embeddings = AdaptiveSparseEmbeddings(config)
        self.layers = nn.ModuleList(
            AdaptiveSparseLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.pooler = AdaptiveSparsePooler(config) if add_pooling_layer else None
        self.head = head
        self.random_step = RandomStep(config)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        global_attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        validate: bool = False,
        **kwargs: Unpack[OutputArguments],
    ) -> BaseModelOutputWithPooling:
        """Encodes a batch of sequences of any length up to `config.max_sequence_length`.

        Args:
            input_ids: [batch, length] token ids; or give `inputs_embeds`.
            attention_mask: [batch, length], 1 for tokens, 0 for padding. None: no padding.
            global_attention_mask: [batch, length], 1 for tokens that attend to all tokens and that
                all attend to. None: `config.default_global_tokens`.
            token_type_ids: [batch, length] segment numbers.
            position_ids: [batch, length] rows of the position table.
            inputs_embeds: [batch, length, hidden_size] in place of the word embeddings.
            validate: also check values whose reading makes the host wait for the device (they are
                always checked on the CPU, except while compiling).
            kwargs: `output_attentions`, `output_hidden_states`, `return_dict`.

        Returns:
            last_hidden_state [batch, length, hidden_size], pooler_output [batch, hidden_size] or
            None, and on request hidden_states and attentions (each [batch, heads, length, length],
            rows summing to 1).

        Raises:
            ValueError: an argument has a wrong shape, type or value, or the sequence is too long.
        """
        check_extra_arguments(kwargs, OutputArguments.__annotations__)
        _, length = check_inputs(
            self.config, input_ids, inputs_embeds, validate, token_type_ids=token_type_ids,
            position_ids=position_ids,
        )  # fmt: skip
        if position_ids is None:
            check_length(length, self.config.max_sequence_length)
        hidden_states = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        masks = encoder_masks(
            self.config,
            hidden_states,
            attention_mask,
            global_attention_mask,
            validate,
            head=self.head,
            input_ids=input_ids,
            token_type_ids=token_type_ids,
        )
        output_attentions = kwargs.get("output_attentions")
        hidden_states = self._encode(hidden_states, masks, output_attentions, validate)
        pooled = None if self.pooler is None else self.pooler(hidden_states, masks[0])
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)


class AdaptiveSparseLMHead(nn.Module):
    """Predicts the token at every position: dense, activation, LayerNorm, decoder.

    RoBERTa's head always has the exact gelu, BERT's and BigBird's the activation of the
    configuration.
    """

    def __init__(self, config: AdaptiveSparseConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = F.gelu if config.head_style == "roberta" else ACT2FN[config.hidden_act]
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.layer_norm(self.activation(self.dense(hidden_states))))


class AdaptiveSparseLanguageModel(AdaptiveSparsePreTrainedModel):
    """A model whose head predicts tokens by a decoder tied to the word embeddings."""

    lm_head: AdaptiveSparseLMHead
    _tied_weights_keys = {"lm_head.decoder.weight": "model.embeddings.word_embeddings.weight"}
    accepts_loss_kwargs = True

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head.decoder = new_embeddings


class AdaptiveSparseForMaskedLM(AdaptiveSparseLanguageModel):
    """The encoder with a masked language modelling head."""

    def __init__(self, config: AdaptiveSparseConfig) -> None:
        super().__init__(config)
        self.model = AdaptiveSparseModel(config, add_pooling_layer=False)
        self.lm_head = AdaptiveSparseLMHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        global_attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        validate: bool = False,
        **kwargs: Unpack[OutputArguments],
    ) -> MaskedLMOutput:
        """Predicts masked tokens; the other arguments are those of `AdaptiveSparseModel.forward`.

        Args:
            labels: [batch, length] token ids; -100 is ignored.

        Returns:
            logits [batch, length, vocab_size], and the loss if there are labels.
        """
        outputs = self.model(
            input_ids, attention_mask, global_attention_mask, token_type_ids, position_ids,
            inputs_embeds, validate, **returning_a_dict(kwargs),
        )  # fmt: skip
        logits = self.lm_head(outputs.last_hidden_state)
        num_items = kwargs.get("num_items_in_batch")
        loss = self.head_loss(token_loss, logits, labels, num_items)
        return MaskedLMOutput(loss=loss, logits=logits, **beside_the_head(outputs))


class AdaptiveSparseClassificationHead(nn.Module):
    """RoBERTa's sequence classification head, on the first token that is not padding.

    BigBird's is the same with the activation of the configuration for tanh.
    """

    def __init__(self, config: AdaptiveSparseConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        is_big_bird = config.head_style == "big_bird"
        self.activation = ACT2FN[config.hidden_act] if is_big_bird else torch.tanh
        self.dropout = nn.Dropout(_classifier_dropout(config))
        self.out_proj = nn.Linear(config.hidden_size, _num_labels(config))

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        pooled = self.dropout(first_valid_token(hidden_states, attention_mask))
        return self.out_proj(self.dropout(self.activation(self.dense(pooled))))


class AdaptiveSparseForSequenceClassification(AdaptiveSparsePreTrainedModel):
    """The encoder with a head that classifies or scores whole sequences.

    `config.head_style` says which head.
    """

    accepts_loss_kwargs = False

    def __init__(self, config: AdaptiveSparseConfig) -> None:
        super().__init__(config)
        self.num_labels = _num_labels(config)
        self.model = AdaptiveSparseModel(
            config, config.head_style == "bert", head="ForSequenceClassification"
        )
        if config.head_style == "bert":
            self.dropout = nn.Dropout(_classifier_dropout(config))
            self.classifier = nn.Linear(config.hidden_size, _num_labels(config))
        else:
            self.classifier = AdaptiveSparseClassificationHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        global_attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        validate: bool = False,
        **kwargs: Unpack[OutputArguments],
    ) -> SequenceClassifierOutput:
        """Classifies sequences; the other arguments are those of `AdaptiveSparseModel.forward`.

        Args:
            labels: [batch] class numbers or regression targets, or [batch, num_labels] floats for
                several labels at once; see `config.problem_type`.

        Returns:
            logits [batch, num_labels], and the loss if there are labels.
        """
        outputs = self.model(
            input_ids, attention_mask, global_attention_mask, token_type_ids, position_ids,
            inputs_embeds, validate, **returning_a_dict(kwargs),
        )  # fmt: skip
        if self.config.head_style == "bert":
            logits = self.classifier(self.dropout(outputs.pooler_output))
        else:
            logits = self.classifier(outputs.last_hidden_state, attention_mask)
        loss = self.head_loss(classification_loss, logits, labels, self.config.problem_type)
        return SequenceClassifierOutput(loss=loss, logits=logits, **beside_the_head(outputs))


class AdaptiveSparseForTokenClassification(AdaptiveSparsePreTrainedModel):
    """The encoder with a head that classifies every token."""

    accepts_loss_kwargs = True

    def __init__(self, config: AdaptiveSparseConfig) -> None:
        super().__init__(config)
        self.num_labels = _num_labels(config)
        self.model = AdaptiveSparseModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(_classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, _num_labels(config))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        global_attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        validate: bool = False,
        **kwargs: Unpack[OutputArguments],
    ) -> TokenClassifierOutput:
        """Classifies tokens; the other arguments are those of `AdaptiveSparseModel.forward`.

        Args:
            labels: [batch, length] class numbers; -100 is ignored.

        Returns:
            logits [batch, length, num_labels], and the loss if there are labels.
        """
        outputs = self.model(
            input_ids, attention_mask, global_attention_mask, token_type_ids, position_ids,
            inputs_embeds, validate, **returning_a_dict(kwargs),
        )  # fmt: skip
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        num_items = kwargs.get("num_items_in_batch")
        loss = self.head_loss(token_loss, logits, labels, num_items)
        return TokenClassifierOutput(loss=loss, logits=logits, **beside_the_head(outputs))


class AdaptiveSparseQuestionAnsweringHead(nn.Module):
    """BigBird's question answering head: a feed-forward layer like the encoder's, then scores."""

    def __init__(self, config: AdaptiveSparseConfig) -> None:
        super().__init__()
        self.intermediate = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.output = nn.Linear(config.intermediate_size, config.hidden_size)
        self.output_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.out_proj = nn.Linear(config.hidden_size, 2)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        transformed = self.activation(self.intermediate(self.dropout(hidden_states)))
        transformed = self.dropout(self.output(transformed))
        return self.out_proj(self.output_layer_norm(transformed + hidden_states))


class AdaptiveSparseForQuestionAnswering(AdaptiveSparsePreTrainedModel):
    """The encoder with a head that scores every token as the start and as the end of the answer.

    By default the question's tokens are global: those before the first separator, or of token type
    0.

    With `config.head_style = "big_bird"` the question is everything up to the first separator of
    `input_ids`, or the first `question_lengths` tokens: it is of token type 0 and the rest of type
    1 unless `token_type_ids` are given, and 1e6 is taken off the logits of its tokens but the
    first.
    """

    accepts_loss_kwargs = False

    def __init__(self, config: AdaptiveSparseConfig) -> None:
        super().__init__(config)
        self.model = AdaptiveSparseModel(
            config, add_pooling_layer=False, head="ForQuestionAnswering"
        )
        if config.head_style == "big_bird":
            self.qa_outputs = AdaptiveSparseQuestionAnsweringHead(config)
        else:
            self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        global_attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        validate: bool = False,
        question_lengths: torch.Tensor | None = None,
        **kwargs: Unpack[OutputArguments],
    ) -> QuestionAnsweringModelOutput:
        """Finds answers; the other arguments are those of `AdaptiveSparseModel.forward`.

        Args:
            start_positions, end_positions: [batch] slots of the answer; those beyond the input are
                ignored.
            question_lengths: [batch, 1], only with `config.head_style = "big_bird"`: the question
                is in so many first slots (separator and any padding in front included), wherever
                the first separator is. Which tokens are global by default it does not say.

        Returns:
            start_logits and end_logits [batch, length], and the loss if both positions are given.

        Raises:
            ValueError: question_lengths are given to another head, or have a wrong shape, type or
                value; or see `AdaptiveSparseModel.forward`.
        """
        is_question = self._question_tokens(input_ids, inputs_embeds, question_lengths, validate)
        if is_question is not None and token_type_ids is None and self.config.type_vocab_size > 1:
            token_type_ids = (~is_question).long()
        outputs = self.model(
            input_ids, attention_mask, global_attention_mask, token_type_ids, position_ids,
            inputs_embeds, validate, **returning_a_dict(kwargs),
        )  # fmt: skip
        logits = self.qa_outputs(outputs.last_hidden_state)
        if is_question is not None:
            logits = mask_question(logits, is_question, attention_mask)
        start_logits, end_logits = logits.movedim(-1, 0).contiguous()
        return QuestionAnsweringModelOutput(
            loss=self.head_loss(span_loss, logits, start_positions, end_positions),
            start_logits=start_logits,
            end_logits=end_logits,
            **beside_the_head(outputs),
        )

    def _question_tokens(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        question_lengths: torch.Tensor | None,
        validate: bool,
    ) -> torch.Tensor | None:
        """Where BigBird's head finds the question; wrong shapes are refused by the encoder."""
        if self.config.head_style != "big_bird":
            if question_lengths is not None:
                raise ValueError(
                    "question_lengths is given, but only the head of config.head_style 'big_bird' "
                    f"rules out the question's tokens, this one is {self.config.head_style!r}"
                )
            return None
        if question_lengths is not None:
            shape = check_tokens(input_ids, inputs_embeds, self.config.hidden_size)
            given = inputs_embeds if input_ids is None else input_ids
            assert given is not None
            return question_of_length(question_lengths, shape, given.device, validate)
        separator = self.config.sep_token_id
        if input_ids is None or separator is None:
            return None
        return question_tokens(input_ids, separator) if input_ids.ndim == 2 else None


class AdaptiveSparseForMultipleChoice(AdaptiveSparsePreTrainedModel):
    """The encoder with a head that scores several choices, every choice a sequence of its own."""

    accepts_loss_kwargs = False

    def __init__(self, config: AdaptiveSparseConfig) -> None:
        super().__init__(config)
        self.model = AdaptiveSparseModel(config, head="ForMultipleChoice")
        self.dropout = nn.Dropout(_classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        global_attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        validate: bool = False,
        **kwargs: Unpack[OutputArguments],
    ) -> MultipleChoiceModelOutput:
        """Scores choices; the arguments of `AdaptiveSparseModel.forward`, with a dimension more.

        Args:
            input_ids, attention_mask, global_attention_mask, token_type_ids, position_ids:
                [batch, num_choices, length].
            inputs_embeds: [batch, num_choices, length, hidden_size].
            labels: [batch] number of the right choice.

        Returns:
            logits [batch, num_choices], and the loss if there are labels.

        Raises:
            ValueError: an input has no dimension for the choices, or see
                `AdaptiveSparseModel.forward`.
        """
        batch_size, num_choices = check_choices(input_ids, inputs_embeds)
        flat = [
            None if tensor is None else tensor.flatten(0, 1)
            for tensor in (
                input_ids,
                attention_mask,
                global_attention_mask,
                token_type_ids,
                position_ids,
                inputs_embeds,
            )
        ]
        outputs = self.model(*flat, validate, **returning_a_dict(kwargs))
        logits = self.classifier(self.dropout(outputs.pooler_output))
        logits = logits.view(batch_size, num_choices)
        loss = self.head_loss(choice_loss, logits, labels)
        return MultipleChoiceModelOutput(loss=loss, logits=logits, **beside_the_head(outputs))


def _classifier_dropout(config: AdaptiveSparseConfig) -> float:
    if config.classifier_dropout is None:
        return config.hidden_dropout_prob
    return config.classifier_dropout


def _num_labels(config: AdaptiveSparseConfig) -> int:
    assert config.num_labels is not None  # Transformers names two labels if nobody else does
    return config.num_labels


__all__ = [
    "AdaptiveSparseForMaskedLM",
    "AdaptiveSparseForMultipleChoice",
    "AdaptiveSparseForQuestionAnswering",
    "AdaptiveSparseForSequenceClassification",
    "AdaptiveSparseForTokenClassification",
    "AdaptiveSparseModel",
    "AdaptiveSparsePreTrainedModel",
]
