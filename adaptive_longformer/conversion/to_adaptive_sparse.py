"""From a source checkpoint to ours: what will be written."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from adaptive_longformer.configuration.remote_code import auto_map
from adaptive_longformer.configuration.shared_config import check_num_labels
from adaptive_longformer.conversion.checkpoint import Checkpoint, inside, read_json, readable
from adaptive_longformer.conversion.companions import FOREIGN_CODE
from adaptive_longformer.conversion.families import (
    FAMILIES,
    head_from_tensors,
    head_of,
    source_class,
    stated_class,
)
from adaptive_longformer.conversion.family import Family
from adaptive_longformer.conversion.plan import Plan, check_against_model, check_layers
from adaptive_longformer.conversion.positions import MAX_POSITIONS, tile_positions
from adaptive_longformer.conversion.source import check_family
from adaptive_longformer.conversion.tables import TARGET_PREFIX
from adaptive_longformer.conversion.target import SEQ2SEQ, Target


@dataclass
class _Source:
    """A checkpoint of another family.

    Attributes:
        raw: the content of its config.json, and `config` what Transformers makes of it.
        names: our full name of each of its tensors; None for one that has no place in our model.
        notes: what the user should know.
    """

    folder: Path
    raw: dict[str, Any]
    family: Family
    config: PreTrainedConfig
    checkpoint: Checkpoint
    names: dict[str, str | None]
    head: str
    notes: list[str]

    @property
    def target(self) -> Target:
        return self.family.target


def plan_conversion(
    folder: Path, max_positions: int | None, attention_window: int | list[int] | None
) -> Plan:
    """Decide what a source checkpoint becomes; reads headers, compares duplicated tensors."""
    source = _read(folder)
    family, target = source.family, source.target
    fields, overrides, exact_length = _target_fields(source, max_positions, attention_window)
    chosen, extra = _choose_tensors(source, overrides)
    with readable("config.json"):
        target_config = _target_config(source, fields, overrides, chosen)

    tensors = {name: source.checkpoint.tensors[theirs] for name, theirs in chosen.items()}
    offset = family.position_offset(source.config)
    source_rows = family.position_rows(source.config)
    num_rows = getattr(target_config, target.positions_field)
    table = tensors.get(target.position_embeddings)
    if table is not None and table.shape[0] != source_rows:
        raise ValueError(
            f"source: tensor {chosen[target.position_embeddings]} has {table.shape[0]} rows, "
            f"but config.json says {family.positions_field} = {source_rows}"
        )
    if table is not None:
        tensors[target.position_embeddings] = table.new_empty(num_rows, table.shape[1])
    target_class = target.classes[source.head]
    missing = check_against_model(
        target_class,
        target_config,
        tensors,
        TARGET_PREFIX,
        lambda name: chosen.get(name) or family.table.to_source(name) or name,
    )
    if missing:
        source.notes.append(
            f"the source has no {', '.join(missing)}: newly initialised at loading, as the source's"
        )

    # The bare base model has no prefix in front of its names, as save_pretrained would write it.
    bare = source.head == "Model" and all(name.startswith(TARGET_PREFIX) for name in chosen)
    written = {name.removeprefix(TARGET_PREFIX) if bare else name: name for name in chosen}

    def load(name: str) -> torch.Tensor:
        tensor = source.checkpoint.load(chosen[written[name]])
        if written[name] == target.position_embeddings:
            return tile_positions(tensor, num_rows, offset)
        return tensor

    return Plan(
        source_model_type=family.model_type,
        head=source.head,
        source_class=source_class(family, source.head),
        target_class=target_class,
        config=json.loads(target_config.to_json_string()),
        tensors={short: tensors[full] for short, full in written.items()},
        load=load,
        extra={name: source.checkpoint.tensors[name] for name in extra},
        load_extra=source.checkpoint.load,
        names={
            "model_type": family.model_type,
            "architecture": target_class.__name__,
            "tensors": {name: ours for name, ours in source.names.items() if name not in extra},
        },
        exact_length=exact_length,
        complete=not missing,
        model_max_length=target_config.max_sequence_length,
        is_resized=num_rows != source_rows,
        generation=_generation(source),
        notes=source.notes,
    )


def read_source_config(raw: dict[str, Any]) -> PreTrainedConfig:
    """Return the Transformers configuration of a source's config.json."""
    return read_config(CONFIG_MAPPING[raw["model_type"]], raw)


def read_config(config_class: type[Any], raw: dict[str, Any]) -> Any:
    """Return a configuration; raise ValueError if config.json is damaged."""
    with readable("config.json"):
        check_num_labels(raw)
        return config_class.from_dict(copy.deepcopy(raw))


def _read(folder: Path) -> _Source:
    """Reads the headers of a checkpoint, and refuses what does not convert."""
    raw = read_json(folder / "config.json")
    check_family(raw.get("model_type"), FAMILIES)
    family = FAMILIES[raw["model_type"]]
    notes = [f"config.json {FOREIGN_CODE}"] if raw.pop("auto_map", None) else []
    config = read_source_config(raw)
    _check_attention(raw)
    checkpoint = Checkpoint(folder)
    check_layers(config, len(checkpoint.tensors))
    names = {name: family.table.to_target(name) for name in checkpoint.tensors}
    stated = stated_class(raw)
    head = head_of(family, stated or "")
    if head is None:
        found = {ours: checkpoint.tensors[name] for name, ours in names.items() if ours}
        head = head_from_tensors(family, found, bool(getattr(config, "is_decoder", False)))
        notes.append(
            f"config.json names {f'{stated!r:.80}' if stated else 'no class'}, which is none that "
            f"converts; the tensors are those of {family.class_prefix}{head}"
        )
    _check_is_causal(config, head)
    return _Source(folder, raw, family, config, checkpoint, names, head, notes)


def _target_config(
    source: _Source, fields: dict[str, Any], overrides: dict[str, Any], chosen: dict[str, str]
) -> Any:
    """Our configuration, with what the way back needs."""
    raw, target = source.raw, source.target
    dtype = raw.get("dtype") or raw.get("torch_dtype")
    if not dtype:
        words = chosen.get(target.word_embeddings)
        dtype = torch.float32 if words is None else source.checkpoint.tensors[words].dtype
    known, stated = TOKENIZER_MAPPING_NAMES[source.family.model_type], raw.get("tokenizer_class")
    return target.config_class(
        **{
            **fields,
            **_special_tokens(source),
            **overrides,
            "architectures": [target.classes[source.head].__name__],
            "auto_map": auto_map(target.config_class.model_type),
            "tokenizer_class": known if known == "TokenizersBackend" else stated or known,
            "dtype": str(dtype).removeprefix("torch."),
            # For the way back: the source's configuration, and what was decided differently.
            "source_config": copy.deepcopy(raw),
            "conversion_overrides": overrides,
        }
    )


def _generation(source: _Source) -> dict[str, Any] | None:
    """The generation settings that old checkpoints keep in config.json, as Transformers reads."""
    if source.family.target is not SEQ2SEQ and source.head != "ForCausalLM":
        return None
    with readable("config.json"):
        settings = GenerationConfig.from_model_config(copy.deepcopy(source.raw)).to_diff_dict()
    settings.pop("_from_model_config", None)
    return settings


def _check_is_causal(config: PreTrainedConfig, head: str) -> None:
    is_decoder = bool(getattr(config, "is_decoder", False))
    if is_decoder != (head == "ForCausalLM"):
        allowed = "only encoders and causal language models convert"
        if not is_decoder:
            allowed = "its tokens attend to later ones, which a causal language model's must not"
        raise ValueError(
            f"source: is_decoder = {str(is_decoder).lower()} in config.json; {allowed}"
        )


def _check_attention(raw: dict[str, Any]) -> None:
    if raw.get("add_cross_attention"):
        raise ValueError(
            "source: add_cross_attention = true in config.json; a decoder of an encoder does not "
            "convert"
        )
    style = raw.get("position_embedding_type", "absolute")
    if style != "absolute":
        raise ValueError(
            f"source: position_embedding_type {style!r} is not supported; only 'absolute' is"
        )


def _target_fields(
    source: _Source, max_positions: int | None, attention_window: int | list[int] | None
) -> tuple[dict[str, Any], dict[str, Any], int | None]:
    """Return our fields, those the user chose, and up to which length logits are equal."""
    family, config, notes = source.family, source.config, source.notes
    fields = family.target_fields(config, source.head)
    overrides: dict[str, Any] = {}
    usable = family.max_length(config)
    exact_length = family.exact_length(config, source.head)
    notes += family.notes(config, source.head)
    if max_positions is not None:
        if not usable <= max_positions <= MAX_POSITIONS:
            raise ValueError(
                f"max_positions: {max_positions} is not allowed; the source reads {usable} tokens, "
                f"allowed are {usable} to {MAX_POSITIONS}"
            )
        if max_positions != usable:
            offset = family.position_offset(config)
            overrides[source.target.positions_field] = max_positions + offset
            notes.append(
                f"the position table was extended from {usable} to {max_positions} tokens by "
                "repeating it: fine-tune before trusting inputs longer than the source's"
            )
            if family.is_dense:
                notes.append(
                    "an adaptive selection (attention_pattern 'adaptive') does not see repeated "
                    "positions, but the attention to what it chose does, until it is fine-tuned"
                )
    if attention_window is not None:
        overrides["attention_window"] = attention_window
        equal_length = _equal_length(fields, attention_window, config.num_hidden_layers)
        if equal_length is not None and equal_length < usable:
            exact_length = equal_length
            notes.append(
                f"attention_window {attention_window} instead of {fields['attention_window']}: "
                f"logits equal the source's only up to {exact_length} tokens"
            )
    elif family.is_dense:
        notes.append(
            f"attention_window {fields['attention_window']}, twice the source's {usable} tokens: "
            f"logits equal the source's up to {usable} tokens; --attention-window makes it smaller "
            "(less time and memory, other logits)"
        )
    return fields, overrides, exact_length


def _equal_length(
    fields: dict[str, Any], attention_window: int | list[int], num_layers: int
) -> int | None:
    """Up to how many tokens other windows than those of `fields` see the same; None: for any."""
    if fields["attention_pattern"] != "longformer":
        raise ValueError(
            f"attention_window: {attention_window!r} is not allowed; the pattern "
            f"{fields['attention_pattern']!r} of this source has none"
        )
    before, after = (
        windows if isinstance(windows, list) else [windows] * num_layers
        for windows in (fields["attention_window"], attention_window)
    )
    if len(after) != len(before):
        raise ValueError(
            f"attention_window: {len(after)} values are not allowed; "
            f"give one number or one for each of the {len(before)} layers"
        )
    for window in after:
        if isinstance(window, bool) or not isinstance(window, int) or window < 2 or window % 2:
            raise ValueError(
                f"attention_window: {window!r} is not allowed; "
                "it counts both sides, so it must be an even number, at least 2"
            )
    # An input of n tokens sees no window edge while n - 1 <= window / 2.
    changed = [min(pair) // 2 + 1 for pair in zip(before, after, strict=True) if len({*pair}) > 1]
    return min(changed, default=None)


def _special_tokens(source: _Source) -> dict[str, Any]:
    """Return the ids of separator and first token, from the configuration or the tokenizer."""
    config = source.config
    if source.family.constants.get("position_style") == "bert":
        vocabulary = _special_token_ids(source.folder)
        found = {"sep_token_id": vocabulary.get("[SEP]"), "cls_token_id": vocabulary.get("[CLS]")}
    else:
        end = config.eos_token_id
        found = {
            "sep_token_id": end[0] if isinstance(end, list) else end,
            "cls_token_id": config.bos_token_id,
        }
    stated = {name: source.raw.get(name, getattr(config, name, None)) for name in found}
    found |= {name: value for name, value in stated.items() if isinstance(value, int)}
    config_class = source.target.config_class
    return {name: value for name, value in found.items() if hasattr(config_class, name)}


def _special_token_ids(folder: Path) -> dict[str, int]:
    """Return token -> id of a BERT tokenizer, as far as its files tell."""
    vocabulary, tokenizer = folder / "vocab.txt", folder / "tokenizer.json"
    if vocabulary.is_file():
        with readable(vocabulary):
            lines = inside(vocabulary).read_text(encoding="utf-8").splitlines()
        return {token: index for index, token in enumerate(lines) if token.startswith("[")}
    if tokenizer.is_file():
        with readable(tokenizer):
            added = read_json(tokenizer).get("added_tokens") or []
            return {token["content"]: token["id"] for token in added}
    return {}


def _choose_tensors(source: _Source, overrides: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Choose for each of our tensors the source tensor it is made of.

    Where a source stores one tensor under two names the values are compared: duplicates are dropped
    (and only their names kept), and if they differ Transformers uses the one the layer itself owns,
    which is the later row of the table.

    Returns:
        Our name -> source name, and the source names that have no place; `source.names` is updated.
    """
    chosen: dict[str, str] = {}
    extra: list[str] = []
    ties = source.config.tie_word_embeddings
    for theirs, ours in source.names.items():
        if ours is None:
            extra.append(theirs)
        elif ours not in chosen:
            chosen[ours] = theirs
        elif not source.checkpoint.equal(theirs, chosen[ours]):
            row_of = source.family.table.row_of
            unused, chosen[ours] = sorted((chosen[ours], theirs), key=row_of)
            if ours == source.target.word_embeddings and ties:
                raise ValueError(
                    f"source: {unused} and {chosen[ours]} differ, but config.json ties them"
                )
            extra.append(unused)
    if ties:
        _drop_tied_copies(source, chosen, overrides)
    if extra:
        source.notes.append(
            f"no place in our model, only kept for a conversion back: {', '.join(sorted(extra))}"
        )
    return chosen, extra


def _drop_tied_copies(source: _Source, chosen: dict[str, str], overrides: dict[str, Any]) -> None:
    """Leave out tables that only repeat the word embeddings; untie them all if one does not."""
    words, names, equal = source.target.word_embeddings, source.names, source.checkpoint.equal
    stored = [name for name in source.target.tied if name in chosen]
    if words not in chosen and stored:
        # The source kept another one of the names of the shared table.
        chosen[words] = chosen.pop(stored.pop(0))
        names[chosen[words]] = words
    different = [name for name in stored if not equal(chosen[name], chosen[words])]
    if not different:
        for name in stored:
            names[chosen.pop(name)] = words
        return
    overrides["tie_word_embeddings"] = False
    source.notes.append(
        f"{', '.join(chosen[name] for name in different)} differs from the word embeddings, but "
        "config.json ties them: kept apart, as Transformers does"
    )
    for name in source.target.tied:
        if name.startswith(TARGET_PREFIX) or source.head == "ForConditionalGeneration":
            chosen.setdefault(name, chosen[words])
