"""Longformer (allenai/longformer-base-4096 and its fine-tuned children)."""

from adaptive_longformer.conversion.family import SHARED_FIELDS, Family
from adaptive_longformer.conversion.tables import BERT_BODY, ROBERTA_HEADS, Table

_SOURCE_ATTENTION = "encoder.layer.{layer}.attention.self."
_TARGET_ATTENTION = "layers.{layer}.attention."

LONGFORMER = Family(
    name="Longformer",
    model_type="longformer",
    class_prefix="Longformer",
    table=Table(
        "longformer.",
        [
            *BERT_BODY,
            *(
                (_SOURCE_ATTENTION + name, _TARGET_ATTENTION + name)
                for name in ("query_global", "key_global", "value_global")
            ),
            "pooler.dense",
        ],
        ROBERTA_HEADS,
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
    takes_global_attention_mask=True,
    is_dense=False,
)
