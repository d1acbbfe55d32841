"""The files beside the weights that go along: tokenizer, generation, sentence-transformers."""

import shutil
from pathlib import Path

from adaptive_longformer.conversion.checkpoint import (
    TORCH_WEIGHTS,
    WEIGHTS,
    Checkpoint,
    inside,
    is_plain_name,
    read_json,
    save_tensors,
    write_json,
)

_TOKENIZER = (
    "tokenizer*", "vocab*", "merges*", "special_tokens_map*", "added_tokens*", "sentencepiece*",
    "*.model",
)  # fmt: skip
_OTHERS = (
    "generation_config.json", "chat_template*", "additional_chat_templates/*",
    "modules.json", "sentence_*_config.json", "config_sentence_transformers.json",
)  # fmt: skip
# No Python file, whatever its name: a converted folder runs no code but ours.
_KINDS = (".json", ".txt", ".model", ".jinja")
FOREIGN_CODE = "of the source names Python code (auto_map), which is not taken over"


def companion_files(folder: Path) -> list[Path]:
    """Return the files of a checkpoint folder that are copied.

    Raises:
        ValueError: one of them is a link that leads out of the folder.
    """
    modules = module_folders(folder)
    found = {file for pattern in (*_TOKENIZER, *_OTHERS) for file in folder.glob(pattern)}
    found |= {file for part in modules for file in (folder / part).glob("*")}
    files = [file for file in sorted(found) if file.is_file() and file.suffix in _KINDS]
    for part in modules:
        weights = (folder / part / name for name in (WEIGHTS, TORCH_WEIGHTS))
        files += [file for file in weights if file.is_file()][:1]
    return [inside(file, folder) for file in files]


def has_tokenizer(folder: Path) -> bool:
    """Tell whether a tokenizer can be made of some files of a folder."""
    return any(file.suffix in _KINDS for name in _TOKENIZER for file in folder.glob(name))


def module_folders(folder: Path) -> list[str]:
    """Return the folders of sentence-transformers' modules, such as pooling and normalisation.

    Raises:
        ValueError: modules.json is damaged, or names what cannot be taken over.
    """
    file = folder / "modules.json"
    if not file.is_file():
        return []
    parts = []
    for module in read_json(file, kind=list):
        part, kind = (
            module.get(key) if isinstance(module, dict) else 0 for key in ("path", "type")
        )
        if not isinstance(kind, str) or not (part == "" or is_plain_name(part)):
            raise ValueError(f"source: {file} holds {module!r:.200}, a module's path is needed")
        if not kind.startswith("sentence_transformers."):
            raise ValueError(
                f"source: {file} names {kind!r:.80}, which is not of sentence-transformers: its "
                "code is not taken over; without modules.json the model alone is converted"
            )
        if part and kind.endswith(".Transformer"):
            raise ValueError(
                f"source: {file} has the model in {part}: save it anew with sentence-transformers, "
                "which puts it beside modules.json"
            )
        if part:
            parts.append(part)
    return parts


def copy_companions(folder: Path, files: list[Path], target: Path) -> None:
    """Copy files to the same places below `target`; pickled weights become safetensors."""
    for part in module_folders(folder):
        (target / part).mkdir()  # an empty one belongs to a module without settings
    for file in files:
        place = target / file.relative_to(folder)
        place.parent.mkdir(exist_ok=True)
        if file.name == TORCH_WEIGHTS:
            weights = Checkpoint(folder, [file])
            tensors = {name: weights.load(name).contiguous() for name in weights.tensors}
            save_tensors(place.with_name(WEIGHTS), tensors)
            continue
        if file.suffix == ".json":
            read_json(file, object, folder)
        shutil.copyfile(file, place)


def adapt_tokenizer(
    folder: Path, max_length: int, is_new: bool, tokenizer_class: str | None
) -> list[str]:
    """Write how many tokens a model reads to its tokenizer, and no code; return notes.

    Args:
        folder: what is being written.
        max_length: the model's longest input.
        is_new: whether it differs from the source's; else a tokenizer that cuts earlier goes on.
        tokenizer_class: of the configuration. Where AutoTokenizer reads tokenizer.json as it is for
            the source's family, whatever the files call their class, it is to do so for ours.
    """
    file, notes = folder / "tokenizer_config.json", []
    content = read_json(file) if file.is_file() else {}
    stated = content.get("model_max_length")
    is_shorter = isinstance(stated, int | float) and 0 < stated < max_length
    content["model_max_length"] = stated if is_shorter and not is_new else max_length
    if tokenizer_class == "TokenizersBackend":
        content["tokenizer_class"] = tokenizer_class
    if content.pop("auto_map", None):
        notes.append(f"{file.name} {FOREIGN_CODE}")
    write_json(file, content)
    for file in folder.glob("sentence_*_config.json"):
        content = read_json(file)
        if is_new and content.get("max_seq_length"):
            write_json(file, content | {"max_seq_length": max_length})
    return notes
