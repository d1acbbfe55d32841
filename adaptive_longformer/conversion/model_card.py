"""The README.md of a converted checkpoint."""

import re
from pathlib import Path
from string import Template
from typing import Any

from adaptive_longformer.configuration.remote_code import auto_class
from adaptive_longformer.conversion.checkpoint import inside
from adaptive_longformer.conversion.plan import Plan

_TEMPLATE = Path(__file__).with_name("model_card.md")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
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


def model_card(
    plan: Plan, *, name: str, source: str, folder: Path, difference: float | None
) -> str:
    """Fill the template: where the weights come from, what they compute, how to load them.

    Args:
        plan: what was written.
        name: the name of its folder.
        source: what the user named as the source: a hub id or a folder.
        folder: where the source is.
        difference: the largest between the logits; None if it was not measured.
    """
    is_hub_id = bool(_HUB_ID.fullmatch(source)) and not Path(source).exists()
    front_matter = f"base_model: {source}\n" if is_hub_id else ""
    config = plan.target_class.config_class.from_dict(dict(plan.config))
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        name=name,
        pipeline_tag=_PIPELINES[plan.head],
        front_matter=front_matter + _license(folder),
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
        notes="".join(f"- {note}\n" for note in plan.notes) or "None.\n",
    )


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


def _license(folder: Path) -> str:
    """Return the license line of the source's own card, if it has one."""
    card = folder / "README.md"
    if not card.is_file():
        return ""
    text = inside(card).read_text(encoding="utf-8", errors="replace")
    front_matter = re.match(r"---\n(.*?)\n---", text, re.S)
    line = front_matter and re.search(r"^license: *[\w.-]+$", front_matter[1], re.M)
    return f"{line[0]}\n" if line else ""
