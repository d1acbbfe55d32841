"""The configuration of the adaptive_sparse encoder."""

import math

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN

from adaptive_longformer.configuration.presets import preset
from adaptive_longformer.configuration.shared_config import (
    BASELINE_PATTERNS,
    MAX_COUNT,
    SELECTING_PATTERNS,
    AdaptiveSparseSharedConfig,
)

__all__ = ["BASELINE_PATTERNS", "SELECTING_PATTERNS", "AdaptiveSparseConfig"]


@strict
class AdaptiveSparseConfig(AdaptiveSparseSharedConfig):
    """Everything that defines an adaptive_sparse encoder.

    Args:
        kwargs: everything else is in `AdaptiveSparseSharedConfig`, the attention above all.
        hidden_size: width of the residual stream, a multiple of `num_attention_heads`.
        num_hidden_layers: number of layers.
        num_attention_heads: heads per layer.
        intermediate_size: width of the feed-forward layer.
        hidden_act: activation of the feed-forward layer.
        hidden_dropout_prob: dropout after embeddings, attention and feed-forward.
        attention_probs_dropout_prob: dropout of the attention probabilities.
        classifier_dropout: dropout of the task heads; None: `hidden_dropout_prob`.
        max_position_embeddings: rows of the position table. RoBERTa's style spends the first
            `pad_token_id + 1` of them; see `max_sequence_length`.
        type_vocab_size: rows of the token type table.
        initializer_range: standard deviation of fresh weights.
        layer_norm_eps: epsilon of every LayerNorm.
        cls_token_id: the special token every sequence starts with.
        position_style: "roberta" counts the tokens that are not padding from `pad_token_id + 1`,
            "bert" numbers the slots from 0.
        head_style: task heads as "roberta", "bert" or "big_bird" builds them.
        rescale_embeddings: whether word embeddings are multiplied by sqrt(hidden_size).
        use_bias: whether the projections to query, key and value have a bias.
        num_sink_tokens: the first tokens of every sequence that all later ones see in the causal
            model, which has no other global tokens.

    Raises:
        ValueError: a value is out of range; the message names the argument, the value and what is
            allowed.
        StrictDataclassFieldValidationError: a value has the wrong type.
    """

    model_type = "adaptive_sparse"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    classifier_dropout: float | int | None = None
    max_position_embeddings: int = 4098
    type_vocab_size: int = 1
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    cls_token_id: int | None = 0
    position_style: str = "roberta"
    head_style: str = "roberta"
    rescale_embeddings: bool = False
    use_bias: bool = True
    num_sink_tokens: int = 4

    def __post_init__(self, **kwargs) -> None:
        super().__post_init__(**kwargs)
        # Before @strict runs it, which would wrap the ValueError in an exception that is none.
        self.validate_adaptive_sparse()

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "AdaptiveSparseConfig":
        """The configuration of a named size, such as "base", with some values replaced.

        Args:
            name: a name of `adaptive_longformer.configuration.presets.Preset`.
            overrides: fields of the configuration.

        Raises:
            ValueError: there is no such preset.
        """
        return cls(**{**preset(name), **overrides})

    @property
    def max_sequence_length(self) -> int:
        """The longest sequence the position table serves, in tokens."""
        return self.max_position_embeddings - self.position_offset

    @property
    def repeated_length(self) -> int | None:
        """After how many tokens the positions of a converted model repeat: the length of its
        source, if it was converted to read more; None otherwise.
        """
        rows = (getattr(self, "source_config", None) or {}).get("max_position_embeddings")
        if rows is None or rows >= self.max_position_embeddings:
            return None
        return rows - self.position_offset

    @property
    def position_offset(self) -> int:
        """The row of the position table that belongs to the first token."""
        if self.position_style == "bert":
            return 0
        assert self.pad_token_id is not None
        return self.pad_token_id + 1

    def validate_adaptive_sparse(self) -> None:
        """Raises ValueError unless all values make sense together."""
        layer = 4 * self.hidden_size**2 + 2 * self.hidden_size * self.intermediate_size
        rows = self.vocab_size + self.max_position_embeddings + self.type_vocab_size
        self._check_values(
            choices={
                "hidden_act": tuple(ACT2FN),
                "position_style": ("roberta", "bert"),
                "head_style": ("roberta", "bert", "big_bird"),
            },
            counts=(
                "hidden_size", "num_attention_heads", "intermediate_size",
                "max_position_embeddings", "type_vocab_size",
            ),
            layers=("num_hidden_layers",),
            probabilities=(
                "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout",
            ),
            from_zero={
                "initializer_range": math.inf, "layer_norm_eps": math.inf,
                "num_sink_tokens": MAX_COUNT,
            },
            weights=rows * self.hidden_size + self.num_hidden_layers * layer,
        )  # fmt: skip
        self._check_heads("hidden_size", "num_attention_heads")
        if self.position_style == "roberta":
            what = "position_style 'roberta' counts positions from it and needs a token id"
            self._need(self.pad_token_id is not None, "pad_token_id", what)
            what = f"position_style 'roberta' needs at least {self.position_offset + 1}"
            self._need(self.max_sequence_length >= 1, "max_position_embeddings", what)
        self._check_selection()
