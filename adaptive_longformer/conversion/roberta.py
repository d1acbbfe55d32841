"""RoBERTa, read with a sliding window and, if asked, longer position tables."""

from adaptive_longformer.conversion.family import SHARED_FIELDS, Family
from adaptive_longformer.conversion.tables import Table, bert_encoder, roberta_heads

ROBERTA = Family(
    name="RoBERTa",
    model_type="roberta",
    class_prefix="Roberta",
    table=Table("roberta.", [*bert_encoder("roberta."), *roberta_heads()]),
    fields=(*SHARED_FIELDS, "classifier_dropout"),
    constants={
        "attention_pattern": "longformer",
        "separate_global_projections": False,
        "head_style": "roberta",
        "position_style": "roberta",
        "zero_padded_rows": False,
    },
    default_global_tokens="auto",
    tokenizer_class="RobertaTokenizer",
)
