"""LED, the Longformer encoder-decoder (allenai/led-base-16384 and its fine-tuned children)."""

from adaptive_longformer.conversion.family import SEQ2SEQ_FIELDS, BartFamily
from adaptive_longformer.conversion.tables import Table, bart_model
from adaptive_longformer.conversion.target import SEQ2SEQ

_SOURCE_LAYER = "led.encoder.layers.{layer}.self_attn."
_SOURCE_ATTENTION = _SOURCE_LAYER + "longformer_self_attn."
_TARGET_ATTENTION = "model.encoder.layers.{layer}.attention."

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
            *bart_model("led."),
            *(
                (
                    _SOURCE_ATTENTION + projection + ".{parameter}",
                    _TARGET_ATTENTION + projection + ".{parameter}",
                )
                for projection in (
                    "query",
                    "key",
                    "value",
                    "query_global",
                    "key_global",
                    "value_global",
                )
            ),
            (_SOURCE_LAYER + "output.{parameter}", _TARGET_ATTENTION + "output.{parameter}"),
            (
                "led.encoder.layernorm_embedding.{parameter}",
                "model.encoder.embeddings.layer_norm.{parameter}",
            ),
            (
                "led.decoder.layernorm_embedding.{parameter}",
                "model.decoder.embeddings.layer_norm.{parameter}",
            ),
            ("qa_outputs.{parameter}", "qa_outputs.{parameter}"),
        ],
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
    tokenizer_class="LEDTokenizer",
    takes_global_attention_mask=True,
    heads=_HEADS,
    is_dense=False,
)
