"""What is compared: attention patterns at stated keys per query, and parts left out."""

from dataclasses import dataclass, field
from typing import Any

from quality.tasks import NUM_LABELS, TYPE_VOCAB_SIZE, VOCAB_SIZE

# The model that every variant starts from, trained with a window and the classification token.
BASE = {
    "vocab_size": VOCAB_SIZE,
    "type_vocab_size": TYPE_VOCAB_SIZE,
    "num_labels": NUM_LABELS,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 4098,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "attention_pattern": "longformer",
    "attention_window": 128,
    "default_global_tokens": "first",
    "selection_top_p": 1.0,
}


@dataclass(frozen=True)
class Variant:
    """How a variant differs from the base model.

    Attributes:
        config: fields of the configuration.
        routing: fields of `RoutingOptions` that are no fields of the configuration.
        zero_gate: gates start at 0 at full strength, in place of the ramp.
    """

    config: dict[str, Any]
    routing: dict[str, Any] = field(default_factory=dict)
    zero_gate: bool = False


def _selecting(blocks: int, pattern: str = "adaptive", window: int = 128, **config) -> Variant:
    where = {"attention_pattern": pattern, "attention_window": window}
    return Variant({**where, "num_selected_blocks": blocks, **config})


def _fixed(pattern: str, **config) -> Variant:
    return Variant({"attention_pattern": pattern, **config})


# At 256 keys per query where a pattern has such a number; 128 in the window are the base model's.
PATTERNS = {
    "full": _fixed("full"),
    "oracle": _selecting(2, "oracle"),
    "adaptive": _selecting(2),
    "adaptive, 128 keys": _selecting(1, window=64),
    "random_selection": _selecting(2, "random_selection"),
    "random_blocks": _fixed("random_blocks", num_random_blocks=2),
    "longformer": _fixed("longformer", attention_window=256),
    "sliding_window": _fixed("sliding_window", attention_window=256),
    "big_bird": _fixed("big_bird"),
    "strided": _fixed("strided", attention_stride=64),
    "fixed": _fixed("fixed", attention_stride=128),
    "linear": _fixed("linear"),
    "window_linear": _fixed("window_linear"),
    "lsh": _fixed("lsh", num_hashes=2),
}
# Those that the smallest preset runs.
FEW_PATTERNS = (
    "full", "oracle", "adaptive", "random_selection", "longformer", "big_bird"
)  # fmt: skip

# Parts of "adaptive" changed or left out. A beam of few nodes makes short documents use the
# pyramid, which otherwise starts at 256 blocks.
ABLATIONS = {
    "adaptive (flat)": PATTERNS["adaptive"],
    "pyramid from 4 nodes, beam 8": _selecting(2, selection_start_nodes=4, selection_beam_width=8),
    "pyramid from 4 nodes, beam 4": _selecting(2, selection_start_nodes=4, selection_beam_width=4),
    "pyramid from 4 nodes, beam 2": _selecting(2, selection_start_nodes=4, selection_beam_width=2),
    "sub-queries of 1 token": Variant(PATTERNS["adaptive"].config, {"tokens_per_vote": 1}),
    "one mean query": Variant(PATTERNS["adaptive"].config, {"tokens_per_vote": 64}),
    "blocks of 32 (sub-blocks of 8)": _selecting(4, block_size=32, query_block_size=32),
    "learned zero gate, no ramp": Variant(PATTERNS["adaptive"].config, zero_gate=True),
    "with 2 learned global blocks": _selecting(2, num_learned_global_blocks=2),
    "top-p 0.95 in place of fixed K": _selecting(2, selection_top_p=0.95),
}

# Quality by keys per query: a window of 128 and 1, 2 or 4 blocks of 64, or a window as wide.
BUDGETS = {
    f"{name}, {blocks} blocks": (
        _fixed("longformer", attention_window=128 + 64 * blocks)
        if name == "longformer"
        else _selecting(blocks, name)
    )
    for blocks in (1, 2, 4)
    for name in ("adaptive", "random_selection", "longformer")
}
