"""BigBird (google/bigbird-roberta-base and its fine-tuned children), encoder or causal."""

from typing import Any

from transformers import PreTrainedConfig

from adaptive_longformer.conversion.family import HEADS, SHARED_FIELDS, Family
from adaptive_longformer.conversion.tables import BERT_BODY, BERT_LM_HEAD, Table

_ATTENTION_TYPES = ("original_full", "block_sparse")


class BlockSparseFamily(Family):
    """A family that attends by blocks or, as its configuration says, to everything."""

    def target_fields(self, config: PreTrainedConfig, head: str) -> dict[str, Any]:
        """Return the fields of our configuration that equals a source configuration."""
        fields = super().target_fields(config, head)
        if config.attention_type not in _ATTENTION_TYPES:
            raise ValueError(
                f"source: attention_type is {config.attention_type!r}, one of {_ATTENTION_TYPES} "
                "is needed"
            )
        is_sparse = config.attention_type == "block_sparse"
        fields["attention_pattern"] = "big_bird" if is_sparse else "full"
        fields["zero_padded_rows"] = is_sparse
        # As many keys as its blocks are, for the day the pattern is set to "longformer".
        window = (5 + config.num_random_blocks) * config.block_size
        fields["attention_window"] = window + window % 2
        return fields


class BigBirdFamily(BlockSparseFamily):
    """BigBird: an encoder, or a causal model that attends to what came before."""

    def target_fields(self, config: PreTrainedConfig, head: str) -> dict[str, Any]:
        """Return the fields of the AdaptiveSparseConfig that equals a source configuration."""
        fields = super().target_fields(config, head)
        if head == "ForCausalLM" and fields["attention_pattern"] == "big_bird":
            fields["attention_pattern"] = "longformer"
            fields["num_sink_tokens"] = config.block_size
            fields["attention_window"] = 2 * self.dense_length(config)
        return fields

    def dense_length(self, config: PreTrainedConfig) -> int:
        """Return up to how many tokens a source that attends by blocks attends to everything."""
        return (5 + 2 * config.num_random_blocks) * config.block_size

    def exact_length(self, config: PreTrainedConfig, head: str) -> int | None:
        """Return up to how many tokens both models see the same; None: for any length."""
        if head == "ForCausalLM" and config.attention_type == "block_sparse":
            return self.dense_length(config)
        return None

    def notes(self, config: PreTrainedConfig, head: str) -> list[str]:
        """Return what a user of this source should know."""
        if head != "ForCausalLM":
            return []
        notes = [
            "Transformers 5.17 gives this source no causal mask: logits equal those of versions "
            "that do, such as 5.23"
        ]
        if self.exact_length(config, head) is None:
            return notes
        return [
            *notes,
            f"above {self.dense_length(config)} tokens the source's block attention is not causal; "
            f"this model is: every token sees the {self.dense_length(config)} before it and the "
            f"first {config.block_size}",
        ]


BIG_BIRD = BigBirdFamily(
    name="BigBird",
    model_type="big_bird",
    class_prefix="BigBird",
    table=Table(
        "bert.",
        [*BERT_BODY, ("pooler", "pooler.dense")],
        [
            *BERT_LM_HEAD,
            "classifier.dense",
            "classifier.out_proj",
            "classifier",
            ("qa_classifier.intermediate.dense", "qa_outputs.intermediate"),
            ("qa_classifier.output.dense", "qa_outputs.output"),
            ("qa_classifier.output.LayerNorm", "qa_outputs.output_layer_norm"),
            ("qa_classifier.qa_outputs", "qa_outputs.out_proj"),
        ],
    ),
    fields=(
        *SHARED_FIELDS,
        "classifier_dropout",
        "sep_token_id",
        "block_size",
        "num_random_blocks",
        "rescale_embeddings",
        "use_bias",
    ),
    constants={
        "separate_global_projections": False,
        "head_style": "big_bird",
        "position_style": "bert",
    },
    default_global_tokens="none",
    heads=(*HEADS, "ForCausalLM"),
    is_dense=False,
    # Pre-training checkpoints hold the masked-language head and next-sentence prediction.
    other_heads={"ForPreTraining": "ForMaskedLM"},
)
