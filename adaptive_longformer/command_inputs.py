"""What a command reads: a document, a model and its tokenizer; or one line that says what is wrong
with them.
"""

import pickle
import sys
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

from adaptive_longformer.gpu import move_to_gpu

_DAMAGE = (EOFError, KeyError, RuntimeError, SafetensorError, pickle.UnpicklingError)


def silence_transformers() -> None:
    """No reports and bars of loading, which would bury what a command says."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def read_document(file: str) -> str:
    """The text of a file, or of standard input if the name is "-".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not text in UTF-8, or empty, or standard input is closed.
    """
    name = "standard input" if file == "-" else file
    if file != "-":
        content = Path(file).read_bytes()
    elif sys.stdin is None:
        raise ValueError("standard input is closed, a text is needed")
    else:
        content = sys.stdin.buffer.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not text in UTF-8: {error}") from error
    if not text.strip():
        raise ValueError(f"{name} is empty, a text is needed")
    return text


def saved_heads(name: str) -> list[str]:
    """The classes that a checkpoint was saved from; none for an adapter, or what is no checkpoint,
    about which loading says more.
    """
    try:
        return AutoConfig.from_pretrained(name).architectures or []
    except (OSError, ValueError):
        return []


def load_model(model_class: Any, name: str, *, use_gpu: bool = True, **options: Any) -> Any:
    """A model, none of whose weights are left random.

    Args:
        model_class: a class with `from_pretrained`.
        name: checkpoint folder or hub id.
        use_gpu: move it to the GPU if there is one; a line on stderr says so.
        options: of `from_pretrained`.

    Raises:
        ValueError: weights are damaged, of other sizes than config.json says, or missing.
    """
    try:
        model, loading = model_class.from_pretrained(name, output_loading_info=True, **options)
    except _DAMAGE as error:
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"{name}: the weights are damaged, or not those that config.json describes ({reason})"
        ) from error
    missing = sorted(loading["missing_keys"])
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise ValueError(
            f"{name}, saved as {', '.join(model.config.architectures or ['another model'])}, has "
            f"no weights for {', '.join(missing[:4])}{more}, they would be random: fine-tune the "
            "model for this task first (the scripts in examples/ do)"
        )
    if use_gpu and (device := move_to_gpu(model)) is not None:
        sys.stderr.write(f"on {device}\n")
    return model


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        ValueError: its files are missing. Transformers then makes one that knows no words.
    """
    tokenizer = AutoTokenizer.from_pretrained(name)
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError(
            f"{name} holds no tokenizer: save that of the source there by tokenizer.save_pretrained"
        )
    return tokenizer
