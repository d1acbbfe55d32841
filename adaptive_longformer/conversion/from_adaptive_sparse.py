"""From one of our checkpoints back to the family it came from: what will be written."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from adaptive_longformer.configuration.configuration_adaptive_sparse import SELECTING_PATTERNS
from adaptive_longformer.conversion.checkpoint import Checkpoint, read_json
from adaptive_longformer.conversion.families import FAMILIES, source_class
from adaptive_longformer.conversion.family import Family
from adaptive_longformer.conversion.plan import (
    EXTRA_FILE,
    NAMES_FILE,
    Plan,
    check_against_model,
)
from adaptive_longformer.conversion.positions import is_tiled
from adaptive_longformer.conversion.source import check_family
from adaptive_longformer.conversion.target import SEQ2SEQ, TARGETS
from adaptive_longformer.conversion.to_adaptive_sparse import read_source_config
from adaptive_longformer.modeling.default_global_tokens import default_strategy


def plan_reversal(folder: Path, drop_adaptive: bool = False) -> Plan:
    """Decide what one of our checkpoints becomes in its source's family.

    A checkpoint that was only converted comes back bit for bit, names included; one that was
    fine-tuned comes back under the family's usual names.

    Args:
        folder: the checkpoint.
        drop_adaptive: whether a selection that is in use may be left out, which changes the logits.

    Raises:
        ValueError: a selection is in use and may not be left out, or the checkpoint is damaged.
    """
    raw = read_json(folder / "config.json")
    check_family(raw.get("model_type"), TARGETS)
    target = TARGETS[raw["model_type"]]
    config = _read_config(target.config_class, raw)
    family = _family(config)
    base_model = target.classes["Model"].__name__
    head = target.head_of((config.architectures or [base_model])[0])
    if head not in family.heads:
        raise ValueError(
            f"source: {target.classes[head].__name__} has no counterpart in the family "
            f"{family.model_type!r}"
        )
    checkpoint = Checkpoint(folder)
    notes: list[str] = []
    _leave_out_selection(config, checkpoint, drop_adaptive, notes)

    tensors, ours, extra = _name_tensors(family, head, config, folder, checkpoint, notes)
    reversed_raw = _source_config(family, head, config)
    rows = _source_rows(family, config, reversed_raw, checkpoint, ours)
    for name, our_name in ours.items():
        if target.full_name(our_name) == target.position_embeddings:
            tensors[name] = tensors[name].new_empty(rows, tensors[name].shape[1])
    our_rows = getattr(config, target.positions_field)
    if rows != our_rows:
        kept = rows - family.position_offset(config)
        notes.append(f"the position table was cut back to the source's {kept} tokens")
    if family.position_rows(read_source_config(reversed_raw)) != rows:
        reversed_raw[family.positions_field] = rows
    source_config = read_source_config(reversed_raw)
    full_names = {
        full_name: tensors[name]
        for name, our_name in ours.items()
        for full_name in (
            family.table.to_source(target.full_name(our_name)) or name,
            _with_prefix(name, head, family.table.source_prefix),
        )
    }
    missing = check_against_model(
        source_class(family, head), source_config, full_names, family.table.source_prefix, str
    )
    missing = [name for name in missing if not _is_duplicate(family, name, full_names)]
    if missing:
        notes.append(f"no {', '.join(missing)} in this checkpoint: newly initialised at loading")
    _note_what_is_lost(family, head, config, source_config, notes)
    extra_file = Checkpoint(folder, [folder / EXTRA_FILE]) if extra else None

    def load(name: str) -> torch.Tensor:
        if extra_file is not None and name in extra_file.tensors:
            return extra_file.load(name)
        tensor = checkpoint.load(ours[name])
        is_positions = target.full_name(ours[name]) == target.position_embeddings
        return tensor[:rows] if is_positions else tensor

    if extra_file is not None:
        tensors.update(extra_file.tensors)
    return Plan(
        source_model_type=family.model_type,
        source_class=target.classes[head],
        target_class=source_class(family, head),
        config=reversed_raw,
        tensors=tensors,
        load=load,
        complete=not any(_is_read(name, family, head, config) for name in missing),
        exact_length=_exact_length(family, head, config, source_config, rows),
        model_max_length=rows - family.position_offset(config) if rows != our_rows else None,
        notes=notes,
    )


def _read_config(config_class: type[Any], raw: dict[str, Any]) -> Any:
    try:
        return config_class.from_dict(copy.deepcopy(raw))
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ValueError(f"source: config.json is damaged: {error}") from error


def _family(config: Any) -> Family:
    source_config = getattr(config, "source_config", None) or {}
    if source_config.get("model_type") in FAMILIES:
        return FAMILIES[source_config["model_type"]]
    if config.model_type == SEQ2SEQ.config_class.model_type:
        return FAMILIES["led" if config.norm_style == "post" else "bigbird_pegasus"]
    if config.separate_global_projections:
        return FAMILIES["longformer"]
    return FAMILIES[config.head_style]


def _is_adaptive(name: str) -> bool:
    return "adaptive" in name.split(".")


def _leave_out_selection(
    config: Any, checkpoint: Checkpoint, drop_adaptive: bool, notes: list[str]
) -> None:
    """Refuse a selection that is in use unless it may be dropped; without strength it is inert."""
    if config.attention_pattern not in SELECTING_PATTERNS:
        return
    names = [
        name for name in checkpoint.tensors if _is_adaptive(name) and name.endswith(".strength")
    ]
    strengths = [float(checkpoint.load(name)) for name in names] or [config.selection_strength]
    if max(strengths) == 0:
        return
    if not drop_adaptive:
        raise ValueError(
            f"source: it selects blocks with strength {max(strengths):g}, which its source's "
            "family cannot do; --drop-adaptive (drop_adaptive=True) leaves the selection out"
        )
    notes.append("the adaptive selection was left out: other logits")


def _name_tensors(
    family: Family,
    head: str,
    config: Any,
    folder: Path,
    checkpoint: Checkpoint,
    notes: list[str],
) -> tuple[dict[str, torch.Tensor], dict[str, str], bool]:
    """Return the tensors under the source's names, and which of ours they are.

    The third value says whether there are tensors beside ours that go back too.
    """
    target = family.target
    recorded: dict[str, list[str]] = {}
    extra = False
    if (folder / NAMES_FILE).is_file():
        record = read_json(folder / NAMES_FILE)
        # A record of another head or family was left behind by something else.
        if record.get("architecture") == target.classes[head].__name__:
            for source_name, our_name in record["tensors"].items():
                recorded.setdefault(our_name, []).append(source_name)
            extra = (folder / EXTRA_FILE).is_file()
    prefix = family.table.source_prefix
    tensors, ours, dropped = {}, {}, []
    for our_name, tensor in checkpoint.tensors.items():
        if _is_adaptive(our_name):
            continue
        usual = family.table.to_source(target.full_name(our_name))
        if usual is None:
            dropped.append(our_name)
            continue
        names = [usual]
        if target.full_name(our_name) == target.word_embeddings and not config.tie_word_embeddings:
            names = family.table.to_sources(target.word_embeddings)
        if head == "Model" and not recorded:
            names = [name.removeprefix(prefix) for name in names]
        for name in recorded.get(target.full_name(our_name), names):
            tensors[name], ours[name] = tensor, our_name
    if dropped:
        notes.append(f"no place in {family.class_prefix}, left out: {', '.join(sorted(dropped))}")
    return tensors, ours, extra


def _with_prefix(name: str, head: str, prefix: str) -> str:
    """Return a source's name with the prefix that a bare base model leaves out."""
    return prefix + name if head == "Model" and not name.startswith(prefix) else name


def _source_config(family: Family, head: str, config: Any) -> dict[str, Any]:
    """Return the source's config.json with what was changed since the conversion."""
    original = getattr(config, "source_config", None)
    if not original or original.get("model_type") != family.model_type:
        original = {"model_type": family.model_type}
    raw: dict[str, Any] = copy.deepcopy(original)
    source_config = read_source_config(raw)
    expected = family.target_fields(source_config, head) | {
        family.target.positions_field: family.position_rows(source_config)
    }
    expected.update(getattr(config, "conversion_overrides", None) or {})
    # Through JSON, as the numbers of labels are strings there.
    now, then = json.loads(config.to_json_string(use_diff=False)), _as_json(expected)
    for ours, theirs in family.copied_fields.items():
        if now.get(ours) != then.get(ours):
            raw[theirs] = now.get(ours)
    if bool(raw.get("is_decoder")) != (head == "ForCausalLM"):
        raw["is_decoder"] = head == "ForCausalLM"
    dtype = "torch_dtype" if "torch_dtype" in raw else "dtype"
    if raw.get(dtype) not in (None, now.get("dtype")):
        raw[dtype] = now["dtype"]
    architecture = family.class_prefix + head
    recorded = raw.get("architectures") or []
    heads = {head, *(other for other, ours in family.other_heads.items() if ours == head)}
    known = recorded and recorded[0] in {family.class_prefix + name for name in heads}
    if not known and (recorded or original == {"model_type": family.model_type}):
        raw["architectures"] = [architecture]
    return raw


def _as_json(fields: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(fields))


def _source_rows(
    family: Family,
    config: Any,
    raw: dict[str, Any],
    checkpoint: Checkpoint,
    ours: dict[str, str],
) -> int:
    """Return how many rows of the position table go back: all, unless the tail only repeats."""
    target = family.target
    source_rows = family.position_rows(read_source_config(raw))
    rows = getattr(config, target.positions_field)
    names = [name for name in ours.values() if target.full_name(name) == target.position_embeddings]
    if "source_config" not in config.to_dict() or source_rows >= rows or not names:
        return rows
    table = checkpoint.load(names[0])
    return source_rows if is_tiled(table, source_rows, family.position_offset(config)) else rows


def _is_duplicate(family: Family, name: str, tensors: dict[str, torch.Tensor]) -> bool:
    """Tell whether a missing tensor is another name of one that is there."""
    ours = family.table.to_target(name)
    if ours is None:
        return False
    usual = family.table.to_source(ours)
    return usual in tensors and usual != name


def _is_read(name: str, family: Family, head: str, config: Any) -> bool:
    """Tell whether our model has a source's tensor too; BigBird's heads have idle poolers."""
    with torch.device("meta"):
        model = family.target.classes[head](config)
    ours = {family.target.full_name(our_name) for our_name, _ in model.named_parameters()}
    return family.table.to_target(name) in ours


def _exact_length(
    family: Family, head: str, config: Any, source_config: Any, rows: int
) -> int | None:
    if not family.is_dense:
        return family.exact_length(source_config, head)
    windows = config.attention_window
    narrowest = min(windows) if isinstance(windows, list) else windows
    return min(narrowest // 2 + 1, rows - family.position_offset(config))


def _note_what_is_lost(
    family: Family, head: str, config: Any, source_config: Any, notes: list[str]
) -> None:
    dilated = config.attention_dilation not in (1, [1] * config.num_hidden_layers)
    pattern = family.target_fields(source_config, head)["attention_pattern"]
    if config.attention_pattern not in (pattern, *SELECTING_PATTERNS) or dilated:
        notes.append(
            f"attention_pattern {config.attention_pattern!r} with attention_dilation "
            f"{config.attention_dilation} has no place in {family.class_prefix}: other logits"
        )
    source_default = default_strategy(family.default_global_tokens, head)
    default = default_strategy(config.default_global_tokens, head, config.attention_pattern)
    if family.takes_global_attention_mask and default != source_default:
        notes.append(
            f"default_global_tokens {config.default_global_tokens!r} has no place in "
            f"{family.class_prefix}, whose default is {source_default!r}: pass "
            "global_attention_mask for the same logits"
        )
