"""LED, the Longformer encoder-decoder (allenai/led-base-16384 and its fine-tuned children)."""

from adaptive_longformer.conversion.family import SEQ2SEQ_FIELDS, BartFamily
from adaptive_longformer.conversion.tables import BART_BODY, BART_HEADS, Table
from adaptive_longformer.conversion.target import SEQ2SEQ

_SOURCE_ATTENTION = "encoder.layers.{layer}.self_attn."
_TARGET_ATTENTION = "encoder.layers.{layer}.attention."

# Transformers has no LEDForSequenceClassification.
_HEADS = ("Model", "ForConditionalGeneration", "ForQuestionAnswering")

LED = BartFamily(
    name="LED",
    model_type="led",
    class_prefix="LED",
    target=SEQ2SEQ,
    table=Table(
        "led.",
        [
            *BART_BODY,
            *(
                (_SOURCE_ATTENTION + f"longformer_self_attn.{name}", _TARGET_ATTENTION + name)
                for name in ("query", "key", "value", "query_global", "key_global", "value_global")
            ),
            (_SOURCE_ATTENTION + "output", _TARGET_ATTENTION + "output"),
            ("encoder.layernorm_embedding", "encoder.embeddings.layer_norm"),
            ("decoder.layernorm_embedding", "decoder.embeddings.layer_norm"),
        ],
        BART_HEADS,
    ),
    fields=(
        *SEQ2SEQ_FIELDS,
        "max_encoder_position_embeddings",
        "max_decoder_position_embeddings",
        "attention_window",
    ),
    constants={
        "attention_pattern": "longformer",
        "separate_global_projections": True,
        "norm_style": "post",
        "scale_embedding": False,
        "use_bias": True,
        "zero_padded_rows": True,
    },
    # Tokens are global only when the user says so.
    default_global_tokens="none",
    takes_global_attention_mask=True,
    heads=_HEADS,
    is_dense=False,
)
