"""BigBird-Pegasus (google/bigbird-pegasus-large-arxiv and its fine-tuned children)."""

from typing import Any

from transformers import PreTrainedConfig

from adaptive_longformer.conversion.family import SEQ2SEQ_FIELDS, BartFamily
from adaptive_longformer.conversion.tables import Table, bart_model
from adaptive_longformer.conversion.target import SEQ2SEQ

_SOURCE_LAYER = "model.encoder.layers.{layer}.self_attn."
_TARGET_ATTENTION = "model.encoder.layers.{layer}.attention."


class BigBirdPegasusFamily(BartFamily):
    """The encoder attends by blocks or, as its configuration says, to everything."""

    def target_fields(self, config: PreTrainedConfig, head: str) -> dict[str, Any]:
        """Return the fields of the AdaptiveSparseSeq2SeqConfig that equals a source's."""
        fields = super().target_fields(config, head)
        is_sparse = config.attention_type == "block_sparse"
        fields["attention_pattern"] = "big_bird" if is_sparse else "full"
        fields["zero_padded_rows"] = is_sparse
        # As many keys as its blocks are, for the day the pattern is set to "longformer".
        window = (5 + config.num_random_blocks) * config.block_size
        fields["attention_window"] = window + window % 2
        return fields


BIGBIRD_PEGASUS = BigBirdPegasusFamily(
    name="BigBird-Pegasus",
    model_type="bigbird_pegasus",
    class_prefix="BigBirdPegasus",
    target=SEQ2SEQ,
    table=Table(
        "model.",
        [
            *bart_model("model."),
            *(
                (
                    _SOURCE_LAYER + "self." + projection + ".{parameter}",
                    _TARGET_ATTENTION + projection + ".{parameter}",
                )
                for projection in ("query", "key", "value")
            ),
            (_SOURCE_LAYER + "output.{parameter}", _TARGET_ATTENTION + "output.{parameter}"),
            *(
                (
                    f"model.{part}.layernorm_embedding.{{parameter}}",
                    f"model.{part}.final_layer_norm.{{parameter}}",
                )
                for part in ("encoder", "decoder")
            ),
            ("qa_outputs.{parameter}", "qa_outputs.{parameter}"),
            ("classification_head.dense.{parameter}", "classifier.dense.{parameter}"),
            ("classification_head.out_proj.{parameter}", "classifier.out_proj.{parameter}"),
        ],
    ),
    fields=(*SEQ2SEQ_FIELDS, "scale_embedding", "use_bias", "block_size", "num_random_blocks"),
    # One number for two tables.
    renamed_fields={
        "max_encoder_position_embeddings": "max_position_embeddings",
        "max_decoder_position_embeddings": "max_position_embeddings",
    },
    constants={"separate_global_projections": False, "norm_style": "pre"},
    default_global_tokens="none",
    tokenizer_class="PegasusTokenizer",
    heads=tuple(SEQ2SEQ.classes),
    is_dense=False,
)
