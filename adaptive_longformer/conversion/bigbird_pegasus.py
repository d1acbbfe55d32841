"""BigBird-Pegasus (google/bigbird-pegasus-large-arxiv and its fine-tuned children)."""

from adaptive_longformer.conversion.big_bird import BlockSparseFamily
from adaptive_longformer.conversion.family import SEQ2SEQ_FIELDS, BartFamily
from adaptive_longformer.conversion.tables import BART_BODY, BART_HEADS, Table
from adaptive_longformer.conversion.target import SEQ2SEQ

_SOURCE_ATTENTION = "encoder.layers.{layer}.self_attn."
_TARGET_ATTENTION = "encoder.layers.{layer}.attention."


class BigBirdPegasusFamily(BlockSparseFamily, BartFamily):
    """BART's layers around BigBird's attention."""


BIGBIRD_PEGASUS = BigBirdPegasusFamily(
    name="BigBird-Pegasus",
    model_type="bigbird_pegasus",
    class_prefix="BigBirdPegasus",
    target=SEQ2SEQ,
    table=Table(
        "model.",
        [
            *BART_BODY,
            *(
                (_SOURCE_ATTENTION + f"self.{name}", _TARGET_ATTENTION + name)
                for name in ("query", "key", "value")
            ),
            (_SOURCE_ATTENTION + "output", _TARGET_ATTENTION + "output"),
            ("encoder.layernorm_embedding", "encoder.final_layer_norm"),
            ("decoder.layernorm_embedding", "decoder.final_layer_norm"),
        ],
        [
            *BART_HEADS,
            ("classification_head.dense", "classifier.dense"),
            ("classification_head.out_proj", "classifier.out_proj"),
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
    heads=tuple(SEQ2SEQ.classes),
    is_dense=False,
)
