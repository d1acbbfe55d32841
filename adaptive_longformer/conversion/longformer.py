"""Longformer (allenai/longformer-base-4096 and its fine-tuned children)."""

from adaptive_longformer.conversion.family import SHARED_FIELDS, Family
from adaptive_longformer.conversion.tables import Table, bert_encoder, roberta_heads

_SOURCE_LAYER = "longformer.encoder.layer.{layer}.attention.self."
_TARGET_LAYER = "model.layers.{layer}.attention."

LONGFORMER = Family(
    name="Longformer",
    model_type="longformer",
    class_prefix="Longformer",
    table=Table(
        "longformer.",
        [
            *bert_encoder("longformer."),
            (
                _SOURCE_LAYER + "query_global.{parameter}",
                _TARGET_LAYER + "query_global.{parameter}",
            ),
            (_SOURCE_LAYER + "key_global.{parameter}", _TARGET_LAYER + "key_global.{parameter}"),
            (
                _SOURCE_LAYER + "value_global.{parameter}",
                _TARGET_LAYER + "value_global.{parameter}",
            ),
            *roberta_heads(),
        ],
    ),
    fields=(*SHARED_FIELDS, "attention_window", "sep_token_id"),
    constants={
        "attention_pattern": "longformer",
        "separate_global_projections": True,
        "head_style": "roberta",
        "position_style": "roberta",
        "zero_padded_rows": True,
    },
    default_global_tokens="longformer",
    tokenizer_class="RobertaTokenizer",
    takes_global_attention_mask=True,
    is_dense=False,
)
