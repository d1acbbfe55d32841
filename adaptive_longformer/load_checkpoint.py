"""Loads what a command needs of a checkpoint, or says in one line what is wrong with it."""

import pickle
from typing import Any

from safetensors import SafetensorError
from transformers import AutoTokenizer

_DAMAGE = (EOFError, KeyError, RuntimeError, SafetensorError, pickle.UnpicklingError)


def load_model(model_class: Any, name: str, **options: Any) -> Any:
    """A model, none of whose weights are left random.

    Args:
        model_class: a class with `from_pretrained`.
        name: checkpoint folder or hub id.
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
            f"{name} has no weights for {', '.join(missing[:4])}{more}, they would be random: "
            "fine-tune the model for this task first"
        )
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
