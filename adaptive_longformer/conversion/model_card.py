"""The README.md of a converted checkpoint."""

import re
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load
from yaml import YAMLError

from adaptive_longformer.configuration.remote_code import auto_class
from adaptive_longformer.conversion.checkpoint import inside
from adaptive_longformer.conversion.plan import Plan

_TEMPLATE = Path(__file__).with_name("model_card.md")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_TAKEN_OVER = ("license", "license_name", "license_link", "language", "datasets")
_PIPELINES = {
    "Model": "feature-extraction",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMultipleChoice": "multiple-choice",
    "ForConditionalGeneration": "summarization",
}


def model_card(plan: Plan, name: str, source: str, folder: Path, difference: float | None) -> str:
    """Fill the template: where the weights come from, what they compute, how to load them.

    Args:
        plan: what was written.
        name: what it is loaded by: the name of its folder, or on the hub.
        source: what the user named as the source: a hub id or a folder.
        folder: where the source is.
        difference: the largest between the logits; None if it was not measured.
    """
    is_hub_id = bool(_HUB_ID.fullmatch(source)) and not Path(source).exists()
    config = plan.target_class.config_class.from_dict(dict(plan.config))
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=_PIPELINES[plan.head],
        tags=["adaptive_sparse", "long-document", plan.source_model_type],
        base_model=source if is_hub_id else None,
        **_of_the_source(folder),
    )
    text = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        name=name,
        source_model_type=plan.source_model_type,
        source_class=plan.source_class.__name__,
        source_link=(
            f"[{source}](https://huggingface.co/{source})"
            if is_hub_id
            else f"`{Path(source).name}`"
        ),
        target_class=plan.target_class.__name__,
        auto_class=auto_class(plan.target_class.__name__),
        num_parameters=f"{plan.num_parameters:,}",
        dtype=str(config.dtype).removeprefix("torch."),
        max_sequence_length=config.max_sequence_length,
        pattern=_pattern(config),
        global_tokens=config.default_global_tokens,
        parity=_parity(plan, difference),
        within="" if plan.exact_length is None else f" up to {plan.exact_length} tokens",
        limits=_limits(plan, config.max_sequence_length),
        notes="".join(f"- {note}\n" for note in plan.notes) or "None.\n",
    )
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def _limits(plan: Plan, max_length: int) -> str:
    """Return what to be careful about, besides the notes."""
    if plan.exact_length is not None and plan.exact_length < max_length:
        return (
            f"Beyond {plan.exact_length} tokens it reads other tokens than the source, or more "
            "than the source ever did: fine-tune it before you trust it there."
        )
    return "What the source cannot do this cannot do either: nothing was trained."


def _parity(plan: Plan, difference: float | None) -> str:
    """Return what is known about the difference between the logits."""
    parity = "not measured (`--verify` measures it)"
    if difference is not None:
        parity = f"largest difference between logits {difference:.2g} (float32, random token ids)"
    if plan.exact_length is not None:
        parity += f"; equal up to {plan.exact_length} tokens"
    return parity


def _pattern(config: Any) -> str:
    """Return the attention pattern in words."""
    if config.attention_pattern == "big_bird":
        return (
            f"big_bird, blocks of {config.block_size} tokens, {config.num_random_blocks} random "
            "blocks in training"
        )
    if config.attention_pattern == "full":
        return "full"
    return f"{config.attention_pattern}, window {config.attention_window} tokens"


def _of_the_source(folder: Path) -> dict[str, Any]:
    """Return what the source's own card says about licence, language and training data."""
    card = folder / "README.md"
    if not card.is_file():
        return {}
    inside(card)
    try:
        found = metadata_load(str(card)) or {}
    except (ValueError, YAMLError):
        return {}
    return {name: found[name] for name in _TAKEN_OVER if _is_text(found.get(name))}


def _is_text(value: object) -> bool:
    """Whether it is a text, or a list of some."""
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(text, str) and len(text) < 200 for text in values)
