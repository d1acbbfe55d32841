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
)

# Files beside the weights that go with a model: tokenizer and generation.
COMPANIONS = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "special_tokens_map*",
    "added_tokens*",
    "sentencepiece*",
    "*.model",
    "generation_config.json",
    "chat_template*",
)

_HUB_COMPANIONS = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "sentencepiece.bpe.model",
    "spiece.model",
    "generation_config.json",
    "chat_template.jinja",
    "README.md",
)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def companion_files(folder: Path) -> list[Path]:
    """Return the tokenizer and generation files of a checkpoint folder."""
    files = {file for pattern in COMPANIONS for file in folder.glob(pattern) if file.is_file()}
    return sorted(files)


def has_tokenizer(companions: Collection[Path]) -> bool:
    """Tell whether a tokenizer can be made of some of these files."""
    return any(file.stem != "generation_config" for file in companions)


def locate(source: str | Path, supported: Collection[str]) -> Path:
    """Return the folder that holds a source checkpoint, fetching a hub id if need be.

    The configuration is looked at first, so that a model of another family is not downloaded.

    Raises:
        FileNotFoundError: neither a folder with a config.json nor a model the hub or its cache has.
        ValueError: the model is of a family that cannot be converted.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"source: {folder} holds no config.json")
        return folder
    if folder.exists():
        raise FileNotFoundError(f"source: {folder} is a file; expected a checkpoint folder")
    name = str(source)
    if not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"source: the folder {name} does not exist")
    config = _fetch(name, "config.json")
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
        for shard in sorted(set(read_json(weights).get("weight_map", {}).values())):
            _fetch(name, shard)
    for file in _HUB_COMPANIONS:
        _fetch(name, file)
    return config.parent


def check_family(model_type: object, supported: Collection[str]) -> None:
    """Raise ValueError if a model type is none of the supported ones."""
    if model_type not in supported:
        if str(model_type).startswith("adaptive_sparse"):
            raise ValueError(
                f"source: model_type {model_type!r} is ours already; "
                "--reverse (reverse=True) converts it back"
            )
        raise ValueError(
            f"source: model_type {model_type!r} cannot be converted; "
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
