"""What is compared: attention patterns at stated keys per query, and parts left out."""

from dataclasses import dataclass, field
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
        options: fields of the selection's options that no configuration has.
        zero_gate: gates start at 0 at full strength, in place of the ramp.
    """

    config: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)
    zero_gate: bool = False


def _selecting(
    blocks: int, pattern: str = "adaptive", options: dict[str, int] | None = None, **config
) -> Variant:
    """A window of 128 and some blocks of 16, chosen by every 16 queries."""
    sizes = {"block_size": 16, "query_block_size": 16}
    where = {"attention_pattern": pattern, "num_selected_blocks": blocks}
    return Variant({**sizes, **where, **config}, options or {})


def _fixed(pattern: str, **config) -> Variant:
    return Variant({"attention_pattern": pattern, **config})


BLOCKS_OF_64 = {"block_size": 64, "query_block_size": 64}
# At 256 keys per query where a pattern has such a number; 128 in the window are the base model's.
PATTERNS = {
    "full": _fixed("full"),
    "oracle": _selecting(8, "oracle"),
    "adaptive": _selecting(8),
    "random_selection": _selecting(8, "random_selection"),
    "longformer": _fixed("longformer", attention_window=256),
    "big_bird": _fixed("big_bird"),
    "adaptive, 128 keys": _selecting(4, attention_window=64),
    # A quarter of what "big_bird" reads.
    "adaptive, 100 keys": _selecting(2, attention_window=64),
    "oracle, blocks of 64": _selecting(2, "oracle", **BLOCKS_OF_64),
    "adaptive, blocks of 64": _selecting(2, **BLOCKS_OF_64),
    "random_blocks": _fixed("random_blocks", num_random_blocks=2),
    "sliding_window": _fixed("sliding_window", attention_window=256),
    "strided": _fixed("strided", attention_stride=64),
    "fixed": _fixed("fixed", attention_stride=128),
    "linear": _fixed("linear"),
    "window_linear": _fixed("window_linear"),
    "lsh": _fixed("lsh"),
}
# Those that the smallest preset runs.
FEW_PATTERNS = tuple(PATTERNS)[:6]

# Parts of "adaptive" changed or left out. A beam of few nodes makes short documents use the
# pyramid, which otherwise starts at 256 blocks.
ABLATIONS = {
    "blocks of 16, flat": PATTERNS["adaptive"],
    "pyramid from 16 nodes, beam 16": _selecting(8, options={"start_nodes": 16, "beam_width": 16}),
    "pyramid from 16 nodes, beam 8": _selecting(8, options={"start_nodes": 16, "beam_width": 8}),
    "pyramid from 16 nodes, beam 4": _selecting(8, options={"start_nodes": 16, "beam_width": 4}),
    "every query votes": _selecting(8, options={"tokens_per_vote": 1}),
    "one mean query": _selecting(8, options={"tokens_per_vote": 16}),
    "blocks of 32": _selecting(4, block_size=32, query_block_size=32),
    "blocks of 64": PATTERNS["adaptive, blocks of 64"],
    "blocks of 64, sub-blocks of 8": _selecting(2, options={"sub_block_size": 8}, **BLOCKS_OF_64),
    "blocks of 64, sub-blocks of 4": _selecting(2, options={"sub_block_size": 4}, **BLOCKS_OF_64),
    "blocks of 64, sub-blocks of 8, every query": _selecting(
        2, options={"tokens_per_vote": 1, "sub_block_size": 8}, **BLOCKS_OF_64
    ),
    "blocks of 64, every query and key": _selecting(
        2, options={"tokens_per_vote": 1, "sub_block_size": 1}, **BLOCKS_OF_64
    ),
    "learned zero gate, no ramp": Variant(PATTERNS["adaptive"].config, zero_gate=True),
    "with 2 learned global blocks": _selecting(8, num_learned_global_blocks=2),
    "residual scores": _selecting(8, residual_rank=8),
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
