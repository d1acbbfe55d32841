"""Finding a source: a local folder, or a model id on the hub (from its cache or the network)."""

import re
from collections.abc import Collection
from pathlib import Path

from transformers.utils.hub import cached_file

from adaptive_longformer.conversion.checkpoint import (
    TORCH_WEIGHTS,
    TORCH_WEIGHTS_INDEX,
    WEIGHTS,
    WEIGHTS_INDEX,
    read_json,
    shard_names,
)
from adaptive_longformer.conversion.companions import module_folders

_HUB_COMPANIONS = (
    "tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "sentencepiece.bpe.model",
    "spiece.model", "generation_config.json", "chat_template.jinja", "modules.json",
    "sentence_bert_config.json", "config_sentence_transformers.json", "README.md",
)  # fmt: skip

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def locate(source: str | Path, supported: Collection[str]) -> Path:
    """Return the folder that holds a source checkpoint, fetching a hub id if need be.

    The configuration is looked at first, so that a model of another family is not downloaded.

    Raises:
        FileNotFoundError: neither a folder with a config.json nor a model the hub or its cache has.
        ValueError: the model is of a family that cannot be converted.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        _check_no_adapter(folder)
        if not (folder / "config.json").is_file():
            module_folders(folder)  # may know where the model is
            raise FileNotFoundError(f"source: {folder} holds no config.json")
        return folder
    if folder.exists():
        raise FileNotFoundError(f"source: {folder} is a file; expected a checkpoint folder")
    name = str(source)
    if not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"source: the folder {name} does not exist")
    config = _fetch(name, "config.json")
    if config is None and (adapter := _fetch(name, "adapter_config.json")):
        _check_no_adapter(adapter.parent)
    if config is None:
        raise FileNotFoundError(
            f"source: {name} is no folder here, and no model of that name was found on the hub "
            "or in its local cache"
        )
    check_family(read_json(config).get("model_type"), supported)
    weights = next(filter(None, (_fetch(name, file) for file in (WEIGHTS, WEIGHTS_INDEX))), None)
    if weights is None:
        files = (TORCH_WEIGHTS, TORCH_WEIGHTS_INDEX)
        weights = next(filter(None, (_fetch(name, file) for file in files)), None)
    if weights is None:
        raise FileNotFoundError(f"source: the hub model {name} has no weights that can be fetched")
    if weights.name.endswith(".index.json"):
        for shard in shard_names(weights):
            _fetch(name, shard)
    for file in _HUB_COMPANIONS:
        _fetch(name, file)
    for part in module_folders(config.parent):
        for file in ("config.json", WEIGHTS, TORCH_WEIGHTS):
            _fetch(name, f"{part}/{file}")
    return config.parent


def _check_no_adapter(folder: Path) -> None:
    """Raise ValueError if a folder holds an adapter of PEFT and no model."""
    names = (WEIGHTS, WEIGHTS_INDEX, TORCH_WEIGHTS, TORCH_WEIGHTS_INDEX)
    has_weights = any((folder / name).is_file() for name in names)
    if (folder / "adapter_config.json").is_file() and not has_weights:
        raise ValueError(
            f"source: {folder} holds an adapter of PEFT, no model: load it with an AutoPeftModel "
            "class, merge it by merge_and_unload(), save that, and convert what was saved"
        )


def check_family(model_type: object, supported: Collection[str]) -> None:
    """Raise ValueError if a model type is none of the supported ones."""
    if not isinstance(model_type, str) or model_type not in supported:
        if str(model_type).startswith("adaptive_sparse"):
            raise ValueError(
                f"source: model_type {model_type!r} is ours already; "
                "--reverse (reverse=True) converts it back"
            )
        raise ValueError(
            f"source: model_type {model_type!r:.80} cannot be converted; "
            f"supported are {', '.join(sorted(supported))}"
        )


def _fetch(name: str, file: str) -> Path | None:
    """Return a hub file's place in the cache, or None if there is no such file."""
    try:
        found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileNotFoundError(
            f"source: {name} is no folder here and could not be fetched from the hub ({reason})"
        ) from error
    return Path(found) if found else None
