"""RoBERTa, XLM-RoBERTa and CamemBERT, read with a sliding window and, if asked, longer position
tables: the same layers under three names.
"""

from dataclasses import replace

from adaptive_longformer.conversion.family import SHARED_FIELDS, Family
from adaptive_longformer.conversion.tables import BERT_BODY, ROBERTA_HEADS, Table

ROBERTA = Family(
    name="RoBERTa",
    model_type="roberta",
    class_prefix="Roberta",
    table=Table("roberta.", [*BERT_BODY, "pooler.dense"], ROBERTA_HEADS),
    fields=(*SHARED_FIELDS, "classifier_dropout"),
    constants={
        "attention_pattern": "longformer",
        "separate_global_projections": False,
        "head_style": "roberta",
        "position_style": "roberta",
        "zero_padded_rows": False,
    },
    default_global_tokens="auto",
)

XLM_ROBERTA = replace(
    ROBERTA, name="XLM-RoBERTa", model_type="xlm-roberta", class_prefix="XLMRoberta"
)
CAMEMBERT = replace(ROBERTA, name="CamemBERT", model_type="camembert", class_prefix="Camembert")
