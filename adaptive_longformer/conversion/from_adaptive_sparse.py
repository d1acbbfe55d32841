"""From one of our checkpoints back to the family it came from: what will be written."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adaptive_longformer.configuration.configuration_adaptive_sparse import SELECTING_PATTERNS
from adaptive_longformer.conversion.checkpoint import Checkpoint, read_json, readable
from adaptive_longformer.conversion.families import FAMILIES, source_class, stated_class
from adaptive_longformer.conversion.family import Family
from adaptive_longformer.conversion.plan import (
    EXTRA_FILE,
    NAMES_FILE,
    Plan,
    check_against_model,
    check_layers,
)
from adaptive_longformer.conversion.positions import is_tiled
from adaptive_longformer.conversion.source import check_family
from adaptive_longformer.conversion.target import SEQ2SEQ, TARGETS
from adaptive_longformer.conversion.to_adaptive_sparse import read_config, read_source_config
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
    ours = _read(folder)
    family, target, head, config = ours.family, ours.family.target, ours.head, ours.config
    _leave_out_selection(ours, drop_adaptive)
    names, extra = _name_tensors(ours)
    tensors = {name: ours.checkpoint.tensors[our_name] for name, our_name in names.items()}
    positions = [
        name
        for name, our_name in names.items()
        if target.full_name(our_name) == target.position_embeddings
    ]
    raw = _source_config(ours)
    rows = _source_rows(ours, raw, [names[name] for name in positions])
    for name in positions:
        tensors[name] = tensors[name].new_empty(rows, tensors[name].shape[1])
    max_length = rows - family.position_offset(config)
    is_cut = rows != getattr(config, target.positions_field)
    if is_cut:
        ours.notes.append(f"the position table was cut back to the source's {max_length} tokens")
    if family.position_rows(read_source_config(raw)) != rows:
        raw[family.positions_field] = rows
    source_config = read_source_config(raw)
    full_names = {
        full_name: tensors[name]
        for name, our_name in names.items()
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
        ours.notes.append(
            f"no {', '.join(missing)} in this checkpoint: newly initialised at loading"
        )
    _note_what_is_lost(ours, source_config)
    if extra is not None:
        tensors.update(extra.tensors)

    def load(name: str) -> torch.Tensor:
        if extra is not None and name in extra.tensors:
            return extra.load(name)
        tensor = ours.checkpoint.load(names[name])
        return tensor[:rows] if name in positions else tensor

    exact_length = family.exact_length(source_config, head)
    if family.is_dense:
        windows = config.attention_window
        narrowest = min(windows) if isinstance(windows, list) else windows
        exact_length = min(narrowest // 2 + 1, max_length)
    return Plan(
        source_model_type=family.model_type,
        head=head,
        source_class=target.classes[head],
        target_class=source_class(family, head),
        config=raw,
        tensors=tensors,
        load=load,
        complete=not any(_is_read(name, ours) for name in missing),
        exact_length=exact_length,
        model_max_length=max_length if is_cut else None,
        is_resized=is_cut,
        notes=ours.notes,
    )


@dataclass
class _Ours:
    """One of our checkpoints, the family it came from, and what the user should know."""

    folder: Path
    family: Family
    head: str
    config: Any
    checkpoint: Checkpoint
    notes: list[str]


def _read(folder: Path) -> _Ours:
    """Reads the headers of a checkpoint, and refuses what has no counterpart."""
    raw = read_json(folder / "config.json")
    check_family(raw.get("model_type"), TARGETS)
    target = TARGETS[raw["model_type"]]
    for name in ("source_config", "conversion_overrides"):
        if not isinstance(value := raw.get(name) or {}, dict):
            raise ValueError(f"source: {name} is {value!r:.80} in config.json, a dict is needed")
    config = read_config(target.config_class, raw)
    family = _family(config)
    head = target.head_of(stated_class(raw) or target.classes["Model"].__name__)
    if head not in family.heads:
        raise ValueError(
            f"source: {target.classes[head].__name__} has no counterpart in the family "
            f"{family.model_type!r}"
        )
    checkpoint = Checkpoint(folder)
    check_layers(config, len(checkpoint.tensors))
    return _Ours(folder, family, head, config, checkpoint, [])


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


def _leave_out_selection(ours: _Ours, drop_adaptive: bool) -> None:
    """Refuse a selection that is in use unless it may be dropped; without strength it is inert."""
    if ours.config.attention_pattern not in SELECTING_PATTERNS:
        return
    strengths = [
        float(ours.checkpoint.load(name))
        for name in ours.checkpoint.tensors
        if _is_adaptive(name) and name.endswith(".strength")
    ] or [ours.config.selection_strength]
    if max(strengths) == 0:
        return
    if not drop_adaptive:
        raise ValueError(
            f"source: it selects blocks with strength {max(strengths):g}, which its source's "
            "family cannot do; --drop-adaptive (drop_adaptive=True) leaves the selection out"
        )
    ours.notes.append("the adaptive selection was left out: other logits")


def _name_tensors(ours: _Ours) -> tuple[dict[str, str], Checkpoint | None]:
    """Return which of our tensors the source's are, and tensors beside ours that go back too."""
    family, target, config = ours.family, ours.family.target, ours.config
    recorded: dict[str, list[str]] = {}
    extra = None
    if (ours.folder / NAMES_FILE).is_file():
        record = read_json(ours.folder / NAMES_FILE)
        # A record of another head or family was left behind by something else.
        if record.get("architecture") == target.classes[ours.head].__name__:
            with readable(ours.folder / NAMES_FILE):
                for source_name, our_name in record["tensors"].items():
                    recorded.setdefault(our_name, []).append(source_name)
            if (ours.folder / EXTRA_FILE).is_file():
                extra = Checkpoint(ours.folder, [ours.folder / EXTRA_FILE])
    found, dropped = {}, []
    for our_name in ours.checkpoint.tensors:
        if _is_adaptive(our_name):
            continue
        full_name = target.full_name(our_name)
        usual = family.table.to_source(full_name)
        if usual is None:
            dropped.append(our_name)
            continue
        names = [usual]
        if full_name == target.word_embeddings and not config.tie_word_embeddings:
            names = family.table.to_sources(target.word_embeddings)
        if ours.head == "Model" and not recorded:
            names = [name.removeprefix(family.table.source_prefix) for name in names]
        found.update(dict.fromkeys(recorded.get(full_name, names), our_name))
    if dropped:
        ours.notes.append(
            f"no place in {family.class_prefix}, left out: {', '.join(sorted(dropped))}"
        )
    return found, extra


def _with_prefix(name: str, head: str, prefix: str) -> str:
    """Return a source's name with the prefix that a bare base model leaves out."""
    return prefix + name if head == "Model" and not name.startswith(prefix) else name


def _source_config(ours: _Ours) -> dict[str, Any]:
    """Return the source's config.json with what was changed since the conversion."""
    family, head, config = ours.family, ours.head, ours.config
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
    now = json.loads(config.to_json_string(use_diff=False))
    then = json.loads(json.dumps(expected))
    for our_name, theirs in family.copied_fields.items():
        if now.get(our_name) != then.get(our_name):
            raw[theirs] = now.get(our_name)
    if bool(raw.get("is_decoder")) != (head == "ForCausalLM"):
        raw["is_decoder"] = head == "ForCausalLM"
    dtype = "torch_dtype" if "torch_dtype" in raw else "dtype"
    if raw.get(dtype) not in (None, now.get("dtype")):
        raw[dtype] = now["dtype"]
    architecture = family.class_prefix + head
    recorded = raw.get("architectures") or []
    heads = {head, *(other for other, known in family.other_heads.items() if known == head)}
    known = recorded and recorded[0] in {family.class_prefix + name for name in heads}
    if not known and (recorded or original == {"model_type": family.model_type}):
        raw["architectures"] = [architecture]
    return raw


def _source_rows(ours: _Ours, raw: dict[str, Any], tables: list[str]) -> int:
    """Return how many rows of the position table go back: all, unless the tail only repeats."""
    source_rows = ours.family.position_rows(read_source_config(raw))
    rows = getattr(ours.config, ours.family.target.positions_field)
    if "source_config" not in ours.config.to_dict() or source_rows >= rows or not tables:
        return rows
    table, offset = ours.checkpoint.load(tables[0]), ours.family.position_offset(ours.config)
    return source_rows if is_tiled(table, source_rows, offset) else rows


def _is_duplicate(family: Family, name: str, tensors: dict[str, torch.Tensor]) -> bool:
    """Tell whether a missing tensor is another name of one that is there."""
    ours = family.table.to_target(name)
    if ours is None:
        return False
    usual = family.table.to_source(ours)
    return usual in tensors and usual != name


def _is_read(name: str, ours: _Ours) -> bool:
    """Tell whether our model has a source's tensor too; BigBird's heads have idle poolers."""
    target = ours.family.target
    with torch.device("meta"):
        model: Any = target.classes[ours.head](ours.config)
    names = {target.full_name(our_name) for our_name, _ in model.named_parameters()}
    return ours.family.table.to_target(name) in names


def _note_what_is_lost(ours: _Ours, source_config: Any) -> None:
    family, config = ours.family, ours.config
    dilated = config.attention_dilation not in (1, [1] * config.num_hidden_layers)
    pattern = family.target_fields(source_config, ours.head)["attention_pattern"]
    if config.attention_pattern not in (pattern, *SELECTING_PATTERNS) or dilated:
        ours.notes.append(
            f"attention_pattern {config.attention_pattern!r} with attention_dilation "
            f"{config.attention_dilation} has no place in {family.class_prefix}: other logits"
        )
    source_default = default_strategy(family.default_global_tokens, ours.head)
    default = default_strategy(config.default_global_tokens, ours.head, config.attention_pattern)
    if family.takes_global_attention_mask and default != source_default:
        ours.notes.append(
            f"default_global_tokens {config.default_global_tokens!r} has no place in "
            f"{family.class_prefix}, whose default is {source_default!r}: pass "
            "global_attention_mask for the same logits"
        )
