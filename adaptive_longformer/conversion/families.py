"""The families that can be converted, and the class of theirs that holds a head."""

import transformers

from adaptive_longformer.conversion.bert import BERT
from adaptive_longformer.conversion.big_bird import BIG_BIRD
from adaptive_longformer.conversion.bigbird_pegasus import BIGBIRD_PEGASUS
from adaptive_longformer.conversion.family import Family
from adaptive_longformer.conversion.led import LED
from adaptive_longformer.conversion.longformer import LONGFORMER
from adaptive_longformer.conversion.roberta import ROBERTA

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (LONGFORMER, LED, BIG_BIRD, BIGBIRD_PEGASUS, ROBERTA, BERT)
}


def family_names() -> str:
    """Return the names of all families for a sentence: "Longformer, LED, ... or BERT"."""
    *names, last = (family.name for family in FAMILIES.values())
    return f"{', '.join(names)} or {last}"


def source_class(family: Family, head: str) -> type:
    """Return the Transformers class of a source with a head."""
    return getattr(transformers, family.class_prefix + head)


def head_of(family: Family, architecture: str) -> str:
    """Return the head that the name of a source's class stands for.

    Raises:
        ValueError: the class has a head that its family has not, or we have not.
    """
    prefix = family.class_prefix
    head = architecture.removeprefix(prefix)
    head = family.other_heads.get(head, head)
    if not architecture.startswith(prefix) or head not in family.heads:
        allowed = ", ".join(prefix + head for head in (*family.heads, *family.other_heads))
        raise ValueError(
            f"source: architecture {architecture!r} cannot be converted; supported are {allowed}"
        )
    return head


def head_from_tensors(names: set[str]) -> str:
    """Guess a head from (our) names of a checkpoint's tensors, if its configuration names none."""
    if names & {"qa_outputs.weight", "qa_outputs.out_proj.weight"}:
        return "ForQuestionAnswering"
    if "classifier.out_proj.weight" in names:
        return "ForSequenceClassification"
    if "classifier.weight" in names:
        pooled = "model.pooler.dense.weight" in names
        return "ForSequenceClassification" if pooled else "ForTokenClassification"
    if "lm_head.dense.weight" in names:
        return "ForMaskedLM"
    if "lm_head.weight" in names or "final_logits_bias" in names:
        return "ForConditionalGeneration"
    return "Model"
