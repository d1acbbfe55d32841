"""The families that can be converted, and which class of ours takes over which class of theirs."""

import transformers

from adaptive_longformer.conversion.bert import BERT
from adaptive_longformer.conversion.big_bird import BIG_BIRD
from adaptive_longformer.conversion.family import Family
from adaptive_longformer.conversion.longformer import LONGFORMER
from adaptive_longformer.conversion.roberta import ROBERTA
from adaptive_longformer.modeling import modeling_adaptive_sparse, modeling_adaptive_sparse_causal

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (LONGFORMER, ROBERTA, BERT, BIG_BIRD)
}
TARGET_CLASS_PREFIX = "AdaptiveSparse"


def source_class(family: Family, head: str) -> type:
    """Return the Transformers class of a source with a head."""
    return getattr(transformers, family.class_prefix + head)


def target_class(head: str) -> type:
    """Return our class with a head."""
    if head == "ForCausalLM":
        return modeling_adaptive_sparse_causal.AdaptiveSparseForCausalLM
    return getattr(modeling_adaptive_sparse, TARGET_CLASS_PREFIX + head)


def head_of(
    class_prefix: str, architecture: str, heads: tuple[str, ...], other_heads: dict[str, str]
) -> str:
    """Return the head that a class name stands for.

    Raises:
        ValueError: the class has a head that its family has not, or we have not.
    """
    head = architecture.removeprefix(class_prefix)
    head = other_heads.get(head, head)
    if not architecture.startswith(class_prefix) or head not in heads:
        allowed = ", ".join(class_prefix + head for head in (*heads, *other_heads))
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
    return "Model"
