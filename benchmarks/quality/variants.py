"""What is compared: attention patterns at stated keys per query, and parts left out."""

from dataclasses import dataclass
from typing import Any

from quality import source_code, tasks

# Of the model for words, and of the one for bytes.
VOCABULARIES = {
    "words": {
        "vocab_size": tasks.VOCAB_SIZE,
        "type_vocab_size": tasks.TYPE_VOCAB_SIZE,
        "num_labels": tasks.NUM_VALUES,
    },
    "bytes": {
        "vocab_size": source_code.VOCAB_SIZE,
        "type_vocab_size": source_code.TYPE_VOCAB_SIZE,
        "num_labels": 256,
    },
}
# The model that every variant starts from, trained with a window and the classification token.
BASE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 4098,
    "initializer_range": 0.125,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "attention_pattern": "longformer",
    "attention_window": 128,
    "default_global_tokens": "first",
}


@dataclass(frozen=True)
class Variant:
    """How a variant differs from the base model.

    Attributes:
        config: fields of the configuration.
        zero_gate: gates start at 0 at full strength, in place of the ramp.
    """

    config: dict[str, Any]
    zero_gate: bool = False


def _selecting(blocks: int, pattern: str = "adaptive", **config) -> Variant:
    """A window of 128 and some blocks, of the default sizes if nothing is said."""
    return Variant({"attention_pattern": pattern, "num_selected_blocks": blocks, **config})


def _fixed(pattern: str, **config) -> Variant:
    return Variant({"attention_pattern": pattern, **config})


# At 256 keys per query where a pattern has such a number; 128 in the window are the base model's.
PATTERNS = {
    "full": _fixed("full"),
    "oracle": _selecting(8, "oracle"),
    "adaptive": _selecting(8),
    "random_selection": _selecting(8, "random_selection"),
    "longformer": _fixed("longformer", attention_window=256),
    "big_bird": _fixed("big_bird", block_size=64),
    # A quarter of what "big_bird" reads.
    "adaptive, 100 keys": _selecting(2, attention_window=64),
    "adaptive, sampled": _selecting(8, selection_sampling=True),
    "random_blocks": _fixed("random_blocks", num_random_blocks=2, block_size=64),
    "sliding_window": _fixed("sliding_window", attention_window=256),
    "strided": _fixed("strided", attention_stride=64),
    "fixed": _fixed("fixed", attention_stride=128),
    "linear": _fixed("linear"),
    "window_linear": _fixed("window_linear"),
    "lsh": _fixed("lsh", block_size=64),
}
# Those that the smallest preset runs.
FEW_PATTERNS = tuple(PATTERNS)[:6]

# Blocks of other sizes at the same number of keys.
SIZES = {
    f"{queries} queries x {keys} keys": _selecting(
        128 // keys, block_size=keys, query_block_size=queries
    )
    for queries, keys in (
        (16, 16), (32, 16), (64, 16), (16, 32), (32, 32), (16, 64), (64, 64)
    )
}  # fmt: skip
# In documents of 4,096 tokens those of the last are all keys.
CANDIDATES = {
    f"{count} candidates": _selecting(8, selection_candidates=count)
    for count in (256, 512, 1024, 2048)
}
# Parts of "adaptive" added or left out.
ABLATIONS = {
    "as it is": PATTERNS["adaptive"],
    "learned zero gate, no ramp": Variant(PATTERNS["adaptive"].config, zero_gate=True),
    "6 chosen and 2 learned global blocks": _selecting(6, num_learned_global_blocks=2),
}

# Quality by keys per query: a window of 128 and 64, 128 or 256 keys in blocks, or a window as wide.
BUDGETS = {
    f"{name}, {128 + 16 * blocks} keys": (
        _fixed("longformer", attention_window=128 + 16 * blocks)
        if name == "longformer"
        else _selecting(blocks, name)
    )
    for blocks in (4, 8, 16)
    for name in ("adaptive", "random_selection", "longformer")
}
