"""The named sizes of the model."""

from enum import Enum
from typing import Any


class Preset(Enum):
    """Values that differ from the defaults of `AdaptiveSparseConfig`, one line per size."""

    TINY = dict(
        vocab_size=1024, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, max_position_embeddings=1026, attention_window=64,
    )  # fmt: skip
    SMALL = dict(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536
    )
    BASE = dict(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072
    )
    LARGE = dict(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    )
    LONG_BASE_16K = {**BASE, "max_position_embeddings": 16386}
    LONG_BASE_128K = {**BASE, "max_position_embeddings": 131074}


def preset(name: str) -> dict[str, Any]:
    """The values of a preset by its name, such as "tiny" or "long-base-16k".

    Raises:
        ValueError: there is no such preset.
    """
    names = {member.name.lower().replace("_", "-"): member for member in Preset}
    if name not in names:
        raise ValueError(f"preset is {name!r}, allowed are {', '.join(map(repr, names))}")
    return dict(names[name].value)
