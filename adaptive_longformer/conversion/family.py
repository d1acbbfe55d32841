"""What a converter has to know about one family of source models."""

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from adaptive_longformer.conversion.tables import Table
from adaptive_longformer.conversion.target import ENCODER, Target

# Of the encoders.
HEADS = (
    "Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification",
    "ForQuestionAnswering", "ForMultipleChoice",
)  # fmt: skip

# Configuration fields that have the same name and meaning in every family and in ours.
SHARED_FIELDS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings",
    "type_vocab_size", "initializer_range", "layer_norm_eps", "pad_token_id", "bos_token_id",
    "eos_token_id", "tie_word_embeddings", "id2label", "label2id", "problem_type",
)  # fmt: skip


# The same for encoder-decoders of the BART family.
SEQ2SEQ_FIELDS = (
    "vocab_size", "d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim",
    "decoder_layers", "decoder_attention_heads", "decoder_ffn_dim", "activation_function",
    "dropout", "attention_dropout", "activation_dropout", "classifier_dropout", "init_std",
    "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "tie_word_embeddings",
    "use_cache", "id2label", "label2id", "problem_type",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One family of source models: its names, its configuration, its tensors.

    Attributes:
        name: as its authors write it, for texts.
        model_type: the source's `model_type`.
        class_prefix: what the source's class names start with ("Longformer").
        table: the names of the tensors.
        fields: configuration fields that are copied, in both directions.
        constants: fields of our configuration that make our model compute what the source does.
        default_global_tokens: what the source does when the user gives no global mask.
        target: the kind of our models that the family becomes.
        takes_global_attention_mask: whether the source's forward has that argument.
        heads: which heads the source has and we too.
        is_dense: whether every token of the source attends to every other one.
        other_heads: names of source classes that hold one of our heads and more.
        renamed_fields: our field -> the source's, copied in both directions too.
    """

    name: str
    model_type: str
    class_prefix: str
    table: Table
    fields: tuple[str, ...]
    constants: dict[str, Any]
    default_global_tokens: str
    target: Target = ENCODER
    takes_global_attention_mask: bool = False
    heads: tuple[str, ...] = HEADS
    is_dense: bool = True
    other_heads: dict[str, str] = field(default_factory=dict)
    renamed_fields: dict[str, str] = field(default_factory=dict)

    @property
    def copied_fields(self) -> dict[str, str]:
        """Our name -> the source's name of every field that is copied."""
        return {name: name for name in self.fields} | self.renamed_fields

    @property
    def positions_field(self) -> str:
        """The source's name for the rows of the position table that can be extended."""
        return self.copied_fields[self.target.positions_field]

    def position_rows(self, config: PreTrainedConfig) -> int:
        """Return the rows of the position table that can be extended."""
        return getattr(config, self.positions_field)

    def position_offset(self, config: PreTrainedConfig) -> int:
        """Return how many rows of the position table come before that of the first token."""
        if self.constants.get("position_style") != "roberta":
            return 0
        if config.pad_token_id is None:
            raise ValueError(
                "source: pad_token_id is null in config.json, but it gives the positions"
            )
        return config.pad_token_id + 1

    def max_length(self, config: PreTrainedConfig) -> int:
        """Return how many tokens a source reads."""
        return self.position_rows(config) - self.position_offset(config)

    def target_fields(self, config: PreTrainedConfig, head: str) -> dict[str, Any]:
        """Return the fields of our configuration that equals a source configuration."""
        fields: dict[str, Any] = {
            ours: getattr(config, source, None) for ours, source in self.copied_fields.items()
        }
        if "attention_window" in fields:
            fields["attention_window"] = _one_value_if_equal(fields["attention_window"])
        else:
            # Twice the longest input: every token sees every other one, as in the source.
            fields["attention_window"] = 2 * self.max_length(config)
        fields.update(self.constants, default_global_tokens=self.default_global_tokens)
        return fields

    def exact_length(self, config: PreTrainedConfig, head: str) -> int | None:
        """Return up to how many tokens both models see the same; None: for any length."""
        return self.max_length(config) if self.is_dense else None

    def notes(self, config: PreTrainedConfig, head: str) -> list[str]:
        """Return what a user of this source should know, one sentence each."""
        return []


class BartFamily(Family):
    """A family of encoder-decoders that descends from BART."""

    def notes(self, config: PreTrainedConfig, head: str) -> list[str]:
        """Return what a user of this source should know."""
        return [
            f"{name} = {getattr(config, name)} has no place in our model: no layer is skipped in "
            "training"
            for name in ("encoder_layerdrop", "decoder_layerdrop")
            if getattr(config, name, None)
        ]


def _one_value_if_equal(window: int | list[int]) -> int | list[int]:
    if isinstance(window, list | tuple) and len(set(window)) == 1:
        return window[0]
    return window
