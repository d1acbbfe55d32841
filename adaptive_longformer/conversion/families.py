"""The families that can be converted, and the class of theirs that holds a head."""

from typing import Any

import torch
import transformers

from adaptive_longformer.conversion.bert import BERT
from adaptive_longformer.conversion.big_bird import BIG_BIRD
from adaptive_longformer.conversion.bigbird_pegasus import BIGBIRD_PEGASUS
from adaptive_longformer.conversion.family import Family
from adaptive_longformer.conversion.led import LED
from adaptive_longformer.conversion.longformer import LONGFORMER
from adaptive_longformer.conversion.roberta import CAMEMBERT, ROBERTA, XLM_ROBERTA

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        LONGFORMER,
        LED,
        BIG_BIRD,
        BIGBIRD_PEGASUS,
        ROBERTA,
        XLM_ROBERTA,
        CAMEMBERT,
        BERT,
    )
}


def family_names() -> str:
    """Return the names of all families for a sentence: "Longformer, LED, ... or BERT"."""
    *names, last = (family.name for family in FAMILIES.values())
    return f"{', '.join(names)} or {last}"


def source_class(family: Family, head: str) -> type:
    """Return the Transformers class of a source with a head."""
    return getattr(transformers, family.class_prefix + head)


def stated_class(raw: dict[str, Any]) -> str | None:
    """Return the name of the class that a config.json says the weights are of."""
    stated = raw.get("architectures") or [None]
    if not isinstance(stated, list) or not isinstance(stated[0], str | None):
        raise ValueError(
            f"source: architectures is {stated!r:.80} in config.json, a list of names is needed"
        )
    return stated[0]


def head_of(family: Family, architecture: str) -> str | None:
    """Return the head that the name of a source's class stands for; None for an unknown class."""
    head = architecture.removeprefix(family.class_prefix)
    head = family.other_heads.get(head, head)
    return head if architecture.startswith(family.class_prefix) and head in family.heads else None


def head_from_tensors(family: Family, tensors: dict[str, torch.Tensor], is_decoder: bool) -> str:
    """Guess a head from (our) names and shapes of a checkpoint's tensors."""
    if tensors.keys() & {"qa_outputs.weight", "qa_outputs.out_proj.weight"}:
        return "ForQuestionAnswering"
    if "classifier.out_proj.weight" in tensors:
        return "ForSequenceClassification"
    if "classifier.weight" in tensors:
        is_pooled = "model.pooler.dense.weight" in tensors
        if family.constants.get("head_style") == "bert" and is_pooled:
            return "ForSequenceClassification"
        has_choices = is_pooled and tensors["classifier.weight"].shape[0] == 1
        return "ForMultipleChoice" if has_choices else "ForTokenClassification"
    if "lm_head.dense.weight" in tensors:
        return "ForCausalLM" if is_decoder else "ForMaskedLM"
    if "lm_head.weight" in tensors or "final_logits_bias" in tensors:
        return "ForConditionalGeneration"
    return "Model"
