"""The README.md of a converted checkpoint."""

import re
from pathlib import Path
from string import Template
from typing import Any

from adaptive_longformer.configuration.remote_code import auto_class

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
    *,
    name: str,
    source: str,
    source_folder: Path,
    source_model_type: str,
    source_class: str,
    target_class: str,
    config: Any,
    num_parameters: int,
    parity: str,
    notes: list[str],
) -> str:
    """Fill the template: where the weights come from, what they compute, how to load them.

    Args:
        name: the folder's name.
        source: what the user named as the source: a hub id or a folder.
        config: the configuration of the result.
        parity: what is known about the difference between the logits.
    """
    head = "For" + target_class.split("For", 1)[1] if "For" in target_class else "Model"
    is_hub_id = bool(_HUB_ID.fullmatch(source)) and not Path(source).exists()
    front_matter = f"base_model: {source}\n" if is_hub_id else ""
    link = f"[{source}](https://huggingface.co/{source})" if is_hub_id else f"`{Path(source).name}`"
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        name=name,
        pipeline_tag=_PIPELINES[head],
        front_matter=front_matter + _license(source_folder),
        source_model_type=source_model_type,
        source_class=source_class,
        source_link=link,
        target_class=target_class,
        auto_class=auto_class(target_class),
        num_parameters=f"{num_parameters:,}",
        dtype=str(config.dtype).removeprefix("torch."),
        max_sequence_length=config.max_sequence_length,
        pattern=_pattern(config),
        global_tokens=config.default_global_tokens,
        parity=parity,
        notes="".join(f"- {note}\n" for note in notes) or "None.\n",
    )


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
    front_matter = re.match(
        r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.S
    )
    line = front_matter and re.search(r"^license: *\S.*$", front_matter[1], re.M)
    return f"{line[0]}\n" if line else ""
