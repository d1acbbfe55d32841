"""The attention that both configurations describe, and what they do for the Hub and for PEFT."""

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig

from adaptive_longformer.attention.backends.choose import BACKENDS
from adaptive_longformer.configuration.remote_code import write_remote_code
from adaptive_longformer.patterns.big_bird import BigBird
from adaptive_longformer.patterns.block_layout import MAX_BLOCK_SIZE, MIN_BLOCK_SIZE
from adaptive_longformer.patterns.fixed import Fixed
from adaptive_longformer.patterns.full import Full
from adaptive_longformer.patterns.pattern import Pattern
from adaptive_longformer.patterns.random_blocks import RandomBlocks
from adaptive_longformer.patterns.sliding_window import SlidingWindow
from adaptive_longformer.patterns.strided import Strided
from adaptive_longformer.selection.options import BLOCK_STEP, SelectionOptions

# How peft's tables of default targets are named, one for each of its methods.
_PEFT_TABLE = "TRANSFORMERS_MODELS_TO_"

# Patterns whose layers choose blocks, and those that no list of keys expresses.
SELECTING_PATTERNS = ("adaptive", "random_selection", "oracle")
BASELINE_PATTERNS = ("linear", "window_linear", "lsh")
WITHOUT_GLOBAL_TOKENS = ("full", "sliding_window", *BASELINE_PATTERNS)

MAX_COUNT = 2**31 - 1  # kernels count in 32 bits
MAX_LAYERS = 10_000
MAX_WEIGHTS = 2**38  # a terabyte in float32
MAX_LABELS = 2**20

_CHOICES = {
    "attention_backend": ("auto", *BACKENDS),
    "attention_pattern": (
        "longformer", "sliding_window", "full", "strided", "fixed", "random_blocks", "big_bird",
        *SELECTING_PATTERNS, *BASELINE_PATTERNS,
    ),
    "default_global_tokens": (
        "auto", "longformer", "none", "first", "question", "after_separator",
    ),
}  # fmt: skip
_COUNTS = (
    "vocab_size", "attention_stride", "num_random_blocks", "block_size", "query_block_size",
    "num_selected_blocks", "selection_candidates",
)  # fmt: skip
# What a block of queries may choose where `num_selected_blocks` does not say.
DEFAULT_SELECTED_KEYS = SelectionOptions.num_blocks * SelectionOptions.block_size
_FROM_ZERO = {
    "attention_seed": 2**63,
    "max_global_tokens": MAX_COUNT,
}


class AdaptiveSparseSharedConfig(PreTrainedConfig):
    """What the configurations of encoders, causal models and encoder-decoders have in common.

    Args:
        vocab_size: rows of the word embedding table.
        pad_token_id, bos_token_id, eos_token_id, sep_token_id: special tokens.
        tie_word_embeddings: whether the language head shares the word embeddings (in an
            encoder-decoder encoder, decoder and head share one table).
        use_cache: whether a causal model or a decoder returns keys and values for the next tokens.
        attention_pattern: "longformer" (sliding window and global tokens), "sliding_window" and
            "full" (both ignore global tokens), "strided", "fixed" (Sparse Transformer),
            "random_blocks" (random blocks and sliding window), "big_bird" (global blocks at both
            ends, a window of blocks, in training also random blocks; see
            `adaptive_longformer.patterns.big_bird`); the last four also take global tokens.
            "adaptive" is "longformer", and every block of queries reads a few more blocks of keys
            that it chooses itself, as far as `selection_strength` lets it. For comparison: the same
            with blocks drawn at random ("random_selection") or chosen by their exact share of full
            attention ("oracle", O(length^2)); linear attention alone and beside a window
            ("linear", "window_linear") and Reformer's hashed buckets ("lsh"), all three without
            global tokens.
        attention_window: keys seen around each query, in tokens, half on each side (Longformer's
            convention: 512 means 256 before and 256 after). One even number, or one per layer.
        attention_dilation: only every so-manieth neighbour is in the window; one number, or one per
            layer.
        attention_stride: stride of the patterns "strided" and "fixed", in tokens.
        num_random_blocks: blocks each query block draws in "random_blocks" and "big_bird".
        block_size: tokens per block in "random_blocks" and "big_bird" (whose checkpoints mostly
            have 64), and per block of keys in "adaptive".
        attention_seed: seed of the blocks that "big_bird" draws anew for every layer and training
            step.
        query_block_size: tokens per block of queries in "adaptive"; it divides `block_size` or is a
            multiple of it.
        num_selected_blocks: blocks of keys that each block of queries may choose; None: what
            holds 512 keys, or all blocks of the longest document if it has fewer.
        selection_strength: from 0, chosen blocks are not read at all, to 1, they are read as the
            window is; 0 reproduces "longformer" bit for bit. Of a fresh layer: a checkpoint brings
            its own, see `AdaptiveSparsePreTrainedModel.set_selection_strength`.
        selection_candidates: about how many keys every query meets one by one when blocks are
            chosen: those of the places that weigh most by means of keys, and all of a document that
            has no more than twice as many.
        selection_sampling: whether blocks are drawn by chance, in proportion to their mass, and
            stand for those that are not read, in place of the largest: nearer to full attention
            in a model that was not trained to choose.
        num_learned_global_blocks: blocks per head that a learned direction chooses for all queries
            of a document, at most 4; 0 in the causal model.
        target_density: share of the keys of the full budget (`num_selected_blocks` and the window)
            that training should leave to a query, at least 2 keys; None: budgets and windows are
            not pressed.
        head_budgets: for every layer the number of blocks that each head may choose, as written by
            `calibrate`; None: as many as `num_selected_blocks` says.
        head_windows: for every layer the number of tokens to either side that each head may see, as
            written by `calibrate`; None: half of `attention_window`. Set it to None to widen the
            window of a calibrated model.
        default_global_tokens: which tokens are global when no `global_attention_mask` is given.
            "none", "first" (first valid token), "question" (before the first separator),
            "after_separator", or one that goes by the head. "auto": "question" for question
            answering, "first" for every other model, "none" for the pattern "big_bird", which has
            its global blocks. "longformer", as the classes of Longformer do: "first" for sequence
            classification, "question" for question answering, "after_separator" for multiple
            choice, "none" for every other model.
        separate_global_projections: Longformer's query_global, key_global and value_global.
        attention_backend: see `adaptive_longformer.attention.backends.choose`; "auto" takes the
            first that fits.
        max_global_tokens: at most this many global tokens per sequence, the first ones. On a GPU so
            many rows are computed, and their number is not read back. None: no limit.
        zero_padded_rows: whether the attention output of padding is 0, as in Longformer, and in
            BigBird for inputs that are not read in full.
    """

    vocab_size: int = 50265
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    sep_token_id: int | None = 2
    tie_word_embeddings: bool = True
    use_cache: bool = True
    attention_pattern: str = "longformer"
    attention_window: int | list[int] = 512
    attention_dilation: int | list[int] = 1
    attention_stride: int = 128
    num_random_blocks: int = 3
    block_size: int = 16
    attention_seed: int = 0
    query_block_size: int = 16
    num_selected_blocks: int | None = None
    selection_strength: float | int = 0.0
    selection_candidates: int = 2048
    selection_sampling: bool = False
    num_learned_global_blocks: int = 0
    target_density: float | int | None = None
    head_budgets: list[list[int]] | None = None
    head_windows: list[list[int]] | None = None
    default_global_tokens: str = "auto"
    separate_global_projections: bool = False
    attention_backend: str = "auto"
    max_global_tokens: int | None = None
    zero_padded_rows: bool = True

    def __post_init__(self, **kwargs) -> None:
        check_num_labels(kwargs)
        super().__post_init__(**kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Does nothing: a checkpoint imports this package, it carries no copy of its source."""

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """Saves as in Transformers, with the files `auto_map` names if the configuration has one.

        Models save their configuration after their own files, so this also replaces the copy of our
        modeling file that Transformers writes for a model loaded with `trust_remote_code`.
        """
        if getattr(self, "auto_map", None):
            os.makedirs(save_directory, exist_ok=True)
            write_remote_code(save_directory, self.model_type)
        super().save_pretrained(save_directory, *args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As in Transformers, and tells PEFT, if it is imported, what it adapts by default: the
        layers that it adapts in BERT.

        PEFT has no registry but these tables, and calls `to_dict` right before it looks a
        model_type up there: whichever was imported first, and PEFT is never imported for it.
        """
        constants = vars(sys.modules.get("peft.utils.constants", object))
        for name, table in constants.items():
            if name.startswith(_PEFT_TABLE) and "bert" in table:
                targets = [target.replace("output.dense", "output") for target in table["bert"]]
                table.setdefault(self.model_type, targets)
        return super().to_dict()

    @property
    def uses_global_tokens(self) -> bool:
        """Whether the pattern takes global tokens at all."""
        return self.attention_pattern not in WITHOUT_GLOBAL_TOKENS

    @property
    def repeated_length(self) -> int | None:
        """After how many tokens the positions of a document repeat; None: they do not."""
        return None

    @property
    def selection_options(self) -> SelectionOptions:
        """How "adaptive" layers choose blocks."""
        num_blocks = self.num_selected_blocks
        if num_blocks is None:
            num_blocks = min(max(1, DEFAULT_SELECTED_KEYS // self.block_size), self._most_blocks)
        return SelectionOptions(
            num_blocks=num_blocks,
            block_size=self.block_size,
            query_block_size=self.query_block_size,
            num_global_blocks=self.num_learned_global_blocks,
            num_candidates=self.selection_candidates,
        )

    @property
    def _most_blocks(self) -> int:
        """Blocks of the longest document."""
        return -(-self.max_sequence_length // self.block_size)

    def pattern(self, layer_idx: int) -> Pattern:
        """The attention pattern of one layer, without its global tokens and without the blocks that
        an adaptive layer chooses.
        """
        if self.attention_pattern == "full":
            return Full()
        if self.attention_pattern == "strided":
            return Strided(self.attention_stride)
        if self.attention_pattern == "fixed":
            return Fixed(self.attention_stride, summary_size=min(8, self.attention_stride))
        if self.attention_pattern == "big_bird":
            return BigBird(self.block_size, self.num_random_blocks)
        radius = _of_layer(self.attention_window, layer_idx) // 2
        window = SlidingWindow(radius, dilation=_of_layer(self.attention_dilation, layer_idx))
        if self.attention_pattern == "random_blocks":
            return RandomBlocks(self.num_random_blocks, self.block_size, seed=layer_idx) | window
        return window

    def _check_values(
        self,
        *,
        choices: Mapping[str, Iterable[str]],
        counts: Iterable[str],
        layers: Iterable[str],
        probabilities: Iterable[str],
        from_zero: Mapping[str, float],
        weights: int,
    ) -> None:
        """Raises ValueError unless values are in range; the arguments name further fields.

        Args:
            from_zero: name -> what the value must be below.
            weights: how many weights the sizes make.
        """
        for name, allowed in {**_CHOICES, **choices}.items():
            words = ", ".join(map(repr, allowed))
            self._need(getattr(self, name) in allowed, name, f"allowed are {words}")
        most = dict.fromkeys((*_COUNTS, *counts), MAX_COUNT) | dict.fromkeys(layers, MAX_LAYERS)
        for name, limit in most.items():
            is_allowed = (value := getattr(self, name)) is None or 1 <= value <= limit
            self._need(is_allowed, name, f"a whole number >= 1 and <= {limit} is needed")
        for name in probabilities:
            is_allowed = (value := getattr(self, name)) is None or 0 <= value < 1
            self._need(is_allowed, name, "a probability 0 <= p < 1 is needed")
        for name, limit in {**_FROM_ZERO, **from_zero}.items():
            is_allowed = (value := getattr(self, name)) is None or 0 <= value < limit
            self._need(is_allowed, name, f"a number >= 0 and < {limit} is needed")
        if weights > MAX_WEIGHTS:
            sizes = [f"{name} = {getattr(self, name)}" for name in ("vocab_size", *counts, *layers)]
            raise ValueError(
                f"{', '.join(sizes)}: these make {weights} weights, up to {MAX_WEIGHTS} are allowed"
            )
        if self.attention_pattern == "big_bird":
            BigBird(self.block_size, self.num_random_blocks)
        self._check_per_layer("attention_window", "an even number >= 2", 2)
        self._check_per_layer("attention_dilation", "a whole number >= 1", 1)
        is_allowed = self.pad_token_id is None or 0 <= self.pad_token_id < self.vocab_size
        needed = f"None or 0 <= id < vocab_size = {self.vocab_size} is needed"
        self._need(is_allowed, "pad_token_id", needed)

    def _need(self, is_allowed: bool, name: str, what: str) -> None:
        if not is_allowed:
            raise ValueError(f"{name} is {getattr(self, name)!r:.200}, {what}")

    def _check_heads(self, width: str, *heads: str) -> None:
        for name in heads:
            number = getattr(self, name)
            is_allowed = getattr(self, width) % number == 0
            self._need(is_allowed, width, f"a multiple of {name} = {number} is needed")

    def _check_selection(self) -> None:
        need, density = self._need, self.target_density
        is_allowed = 0 <= self.selection_strength <= 1
        need(is_allowed, "selection_strength", "a number from 0 to 1 is needed")
        is_allowed = density is None or 0 < density <= 1
        need(is_allowed, "target_density", "a number above 0 and up to 1 is needed")
        is_allowed = 0 <= self.num_learned_global_blocks <= 4
        need(is_allowed, "num_learned_global_blocks", "0 to 4 is allowed")
        known = {field.name for field in fields(self)}
        unknown = sorted(n for n in vars(self) if n.startswith("selection_") and n not in known)
        if unknown:
            raise ValueError(
                f"unknown fields {', '.join(unknown)}: this configuration may be from a newer "
                "version of adaptive-longformer"
            )
        if self.attention_pattern in SELECTING_PATTERNS:
            self._check_adaptive_sizes()
        layers = range(self.num_hidden_layers)
        if self.head_budgets is not None:
            budgets = [self.selection_options.num_blocks for _ in layers]
            self._check_per_head("head_budgets", budgets, "num_selected_blocks")
        if self.head_windows is not None:
            radii = [_of_layer(self.attention_window, layer_idx) // 2 for layer_idx in layers]
            self._check_per_head("head_windows", radii, "half of attention_window")

    def _check_per_head(self, name: str, most: list[int], meaning: str) -> None:
        value, num_heads = getattr(self, name), self.num_attention_heads
        is_allowed = len(value) == self.num_hidden_layers and all(
            len(heads) == num_heads and all(0 <= n <= limit for n in heads)
            for heads, limit in zip(value, most, strict=True)
        )
        limits = most[0] if len(set(most)) == 1 else most
        self._need(
            is_allowed,
            name,
            f"num_hidden_layers = {self.num_hidden_layers} lists of num_attention_heads = "
            f"{num_heads} numbers from 0 to {meaning} = {limits} are needed",
        )

    def _check_adaptive_sizes(self) -> None:
        pattern = f"attention_pattern {self.attention_pattern!r} needs"
        sizes = f"{pattern} a multiple of {BLOCK_STEP} from {MIN_BLOCK_SIZE} to {MAX_BLOCK_SIZE}"
        for name in ("block_size", "query_block_size"):
            value = getattr(self, name)
            is_allowed = MIN_BLOCK_SIZE <= value <= MAX_BLOCK_SIZE and value % BLOCK_STEP == 0
            self._need(is_allowed, name, sizes)
        small, large = sorted((self.block_size, self.query_block_size))
        what = f"a divisor or a multiple of block_size = {self.block_size} is needed"
        self._need(large % small == 0, "query_block_size", what)
        num_blocks, most = self.selection_options.num_blocks, self._most_blocks
        if num_blocks > most:
            raise ValueError(
                f"num_selected_blocks is {num_blocks}, at most {most} is allowed: the longest "
                f"document of {self.max_sequence_length} tokens has no more blocks of "
                f"{self.block_size}"
            )
        narrowest = min(_of_layer(self.attention_window, i) for i in range(self.num_hidden_layers))
        full_budget = num_blocks * self.block_size + narrowest
        self._need(
            self.target_density is None or self.target_density * full_budget >= 2,
            "target_density",
            f"at least {2 / full_budget:.2g} can be reached: 2 of the {full_budget} keys of the "
            "full budget",
        )
        dilation = self.attention_dilation
        is_one = all(d == 1 for d in (dilation if isinstance(dilation, list) else [dilation]))
        self._need(is_one, "attention_dilation", f"{pattern} 1")

    def _check_per_layer(self, name: str, needed: str, step: int) -> None:
        value = getattr(self, name)
        if isinstance(value, list) and len(value) != self.num_hidden_layers:
            raise ValueError(
                f"{name} has {len(value)} values, one number or "
                f"num_hidden_layers = {self.num_hidden_layers} values are needed"
            )
        numbers = value if isinstance(value, list) else [value]
        is_allowed = all(step <= n <= MAX_COUNT and n % step == 0 for n in numbers)
        self._need(is_allowed, name, f"{needed} is needed (for every layer)")


def check_num_labels(fields: Mapping[str, Any]) -> None:
    """Raises ValueError for more labels than can be named: Transformers names them all at once."""
    if isinstance(num := fields.get("num_labels"), int) and num > MAX_LABELS:
        raise ValueError(f"num_labels is {num}, at most {MAX_LABELS} are allowed")


def _of_layer(value: int | list[int], layer_idx: int) -> int:
    return value[layer_idx] if isinstance(value, list) else value
