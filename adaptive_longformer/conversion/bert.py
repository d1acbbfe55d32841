"""BERT, read with a sliding window and, if asked, longer position tables."""

from adaptive_longformer.conversion.family import SHARED_FIELDS, Family
from adaptive_longformer.conversion.tables import BERT_BODY, BERT_LM_HEAD, Table

BERT = Family(
    name="BERT",
    model_type="bert",
    class_prefix="Bert",
    table=Table("bert.", [*BERT_BODY, "pooler.dense"], [*BERT_LM_HEAD, "classifier", "qa_outputs"]),
    fields=(*SHARED_FIELDS, "classifier_dropout"),
    constants={
        "attention_pattern": "longformer",
        "separate_global_projections": False,
        "head_style": "bert",
        "position_style": "bert",
        "zero_padded_rows": False,
    },
    default_global_tokens="auto",
    # Pre-training checkpoints hold the masked-language head and next-sentence prediction.
    other_heads={"ForPreTraining": "ForMaskedLM"},
)
