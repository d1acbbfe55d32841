"""The configuration of the adaptive_sparse encoder."""

from dataclasses import fields

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN

from adaptive_longformer.attention.backends.choose import BACKENDS
from adaptive_longformer.configuration.presets import preset
from adaptive_longformer.configuration.shared_config import AdaptiveSparseSharedConfig
from adaptive_longformer.patterns.big_bird import BigBird
from adaptive_longformer.patterns.block_layout import MAX_BLOCK_SIZE, MIN_BLOCK_SIZE
from adaptive_longformer.patterns.fixed import Fixed
from adaptive_longformer.patterns.full import Full
from adaptive_longformer.patterns.pattern import Pattern
from adaptive_longformer.patterns.random_blocks import RandomBlocks
from adaptive_longformer.patterns.sliding_window import SlidingWindow
from adaptive_longformer.patterns.strided import Strided
from adaptive_longformer.selection.options import SelectionOptions
from adaptive_longformer.selection.pyramid import FAN_OUT

ALLOWED = {
    "attention_backend": ("auto", *BACKENDS),
    "hidden_act": tuple(ACT2FN),
    "attention_pattern": (
        "longformer",
        "sliding_window",
        "full",
        "strided",
        "fixed",
        "random_blocks",
        "big_bird",
        "adaptive",
        "random_selection",
        "oracle",
        "linear",
        "window_linear",
        "lsh",
    ),
    "default_global_tokens": (
        "auto",
        "longformer",
        "none",
        "first",
        "question",
        "after_separator",
    ),
    "position_style": ("roberta", "bert"),
    "head_style": ("roberta", "bert", "big_bird"),
}
POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
    "attention_stride",
    "num_random_blocks",
    "block_size",
    "query_block_size",
    "num_selected_blocks",
)
# Patterns whose layers choose blocks, and those that no list of keys expresses.
SELECTING_PATTERNS = ("adaptive", "random_selection", "oracle")
BASELINE_PATTERNS = ("linear", "window_linear", "lsh")
WITHOUT_GLOBAL_TOKENS = ("full", "sliding_window", *BASELINE_PATTERNS)
PROBABILITIES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")


@strict
class AdaptiveSparseConfig(AdaptiveSparseSharedConfig):
    """Everything that defines an adaptive_sparse encoder.

    Args:
        vocab_size: rows of the word embedding table.
        hidden_size: width of the residual stream, a multiple of `num_attention_heads`.
        num_hidden_layers: number of layers.
        num_attention_heads: heads per layer.
        intermediate_size: width of the feed-forward layer.
        hidden_act: activation of the feed-forward layer.
        hidden_dropout_prob: dropout after embeddings, attention and feed-forward.
        attention_probs_dropout_prob: dropout of the attention probabilities.
        classifier_dropout: dropout of the task heads; None: `hidden_dropout_prob`.
        max_position_embeddings: rows of the position table. RoBERTa's style spends the first
            `pad_token_id + 1` of them; see `max_sequence_length`.
        type_vocab_size: rows of the token type table.
        initializer_range: standard deviation of fresh weights.
        layer_norm_eps: epsilon of every LayerNorm.
        pad_token_id, bos_token_id, eos_token_id, sep_token_id, cls_token_id: special tokens.
        tie_word_embeddings: whether the masked language head shares the word embeddings.
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
        block_size: tokens per block in "random_blocks" and "big_bird", and per block of keys in
            "adaptive".
        attention_seed: seed of the blocks that "big_bird" draws anew for every layer and training
            step.
        query_block_size: tokens per block of queries in "adaptive"; it divides `block_size` or is a
            multiple of it.
        num_selected_blocks: blocks of keys that each block of queries may choose.
        selection_strength: from 0, chosen blocks are not read at all, to 1, they are read as the
            window is; 0 reproduces "longformer" bit for bit. Of a fresh layer: a checkpoint brings
            its own, see `AdaptiveSparsePreTrainedModel.set_selection_strength`.
        selection_candidates: about how many keys every query meets one by one when blocks are
            chosen; a document of no more tokens is searched exactly, a longer one keeps so many by
            summaries first. 0: summaries only.
        num_learned_global_blocks: blocks per head that a learned direction chooses for all queries
            of a document, at most 4; 0 in the causal model.
        residual_rank: rank of a learned score of pairs of blocks, which weighs the chosen blocks
            and moves them up or down in the choice; 0: there is none. For encoders only.
        target_density: share of the keys of the full budget (`num_selected_blocks` and the window)
            that training should leave to a query, at least 2 keys; None: budgets and windows are
            not pressed.
        head_budgets: for every layer the number of blocks that each head may choose, as written by
            `calibrate`; None: `num_selected_blocks`.
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
        position_style: "roberta" counts the tokens that are not padding from `pad_token_id + 1`,
            "bert" numbers the slots from 0.
        head_style: task heads as "roberta", "bert" or "big_bird" builds them.
        zero_padded_rows: whether the attention output of padding is 0, as in Longformer, and in
            BigBird for inputs that are not read in full.
        rescale_embeddings: whether word embeddings are multiplied by sqrt(hidden_size).
        use_bias: whether the projections to query, key and value have a bias.
        num_sink_tokens: the first tokens of every sequence that all later ones see in the causal
            model, which has no other global tokens.
        use_cache: whether the causal model returns keys and values for the next tokens.

    Raises:
        ValueError: a value is out of range; the message names the argument, the value and what is
            allowed.
        StrictDataclassFieldValidationError: a value has the wrong type.
    """

    model_type = "adaptive_sparse"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 50265
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    classifier_dropout: float | int | None = None
    max_position_embeddings: int = 4098
    type_vocab_size: int = 1
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    sep_token_id: int | None = 2
    cls_token_id: int | None = 0
    tie_word_embeddings: bool = True
    attention_pattern: str = "longformer"
    attention_window: int | list[int] = 512
    attention_dilation: int | list[int] = 1
    attention_stride: int = 128
    num_random_blocks: int = 3
    block_size: int = 64
    attention_seed: int = 0
    query_block_size: int = 64
    num_selected_blocks: int = 8
    selection_strength: float | int = 0.0
    selection_candidates: int = 0
    num_learned_global_blocks: int = 0
    residual_rank: int = 0
    target_density: float | int | None = None
    head_budgets: list[list[int]] | None = None
    head_windows: list[list[int]] | None = None
    default_global_tokens: str = "auto"
    separate_global_projections: bool = False
    attention_backend: str = "auto"
    max_global_tokens: int | None = None
    position_style: str = "roberta"
    head_style: str = "roberta"
    zero_padded_rows: bool = True
    rescale_embeddings: bool = False
    use_bias: bool = True
    num_sink_tokens: int = 4
    use_cache: bool = True

    def __post_init__(self, **kwargs) -> None:
        super().__post_init__(**kwargs)
        # Before @strict runs it, which would wrap the ValueError in an exception that is none.
        self.validate_adaptive_sparse()

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "AdaptiveSparseConfig":
        """The configuration of a named size, such as "base", with some values replaced.

        Args:
            name: a name of `adaptive_longformer.configuration.presets.Preset`.
            overrides: fields of the configuration.

        Raises:
            ValueError: there is no such preset.
        """
        return cls(**{**preset(name), **overrides})

    @property
    def max_sequence_length(self) -> int:
        """The longest sequence the position table serves, in tokens."""
        return self.max_position_embeddings - self.position_offset

    @property
    def position_offset(self) -> int:
        """The row of the position table that belongs to the first token."""
        if self.position_style == "bert":
            return 0
        assert self.pad_token_id is not None
        return self.pad_token_id + 1

    @property
    def uses_global_tokens(self) -> bool:
        """Whether the pattern takes global tokens at all."""
        return self.attention_pattern not in WITHOUT_GLOBAL_TOKENS

    @property
    def selection_options(self) -> SelectionOptions:
        """How "adaptive" layers choose blocks."""
        return SelectionOptions(
            num_blocks=self.num_selected_blocks,
            block_size=self.block_size,
            query_block_size=self.query_block_size,
            num_global_blocks=self.num_learned_global_blocks,
            num_candidates=self.selection_candidates,
        )

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

    def validate_adaptive_sparse(self) -> None:
        """Raises ValueError unless all values make sense together."""
        for name, allowed in ALLOWED.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(
                    f"{name} is {value!r}, allowed are {', '.join(map(repr, allowed))}"
                )
        for name in POSITIVE:
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}, a whole number >= 1 is needed")
        for name in PROBABILITIES:
            if (value := getattr(self, name)) is not None and not 0 <= value < 1:
                raise ValueError(f"{name} is {value}, a probability 0 <= p < 1 is needed")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size is {self.hidden_size}, "
                f"a multiple of num_attention_heads = {self.num_attention_heads} is needed"
            )
        if self.max_global_tokens is not None and self.max_global_tokens < 0:
            raise ValueError(
                f"max_global_tokens is {self.max_global_tokens}, None or >= 0 is needed"
            )
        if self.attention_pattern == "big_bird":
            BigBird(self.block_size, self.num_random_blocks)
        if self.num_sink_tokens < 0:
            raise ValueError(f"num_sink_tokens is {self.num_sink_tokens}, >= 0 is needed")
        self._check_per_layer(
            "attention_window", "an even number >= 2", lambda v: v >= 2 and v % 2 == 0
        )
        self._check_per_layer("attention_dilation", "a whole number >= 1", lambda v: v >= 1)
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id is {self.pad_token_id}, "
                f"None or 0 <= id < vocab_size = {self.vocab_size} is needed"
            )
        if self.position_style == "roberta":
            if self.pad_token_id is None:
                raise ValueError(
                    "pad_token_id is None, position_style 'roberta' counts positions from it "
                    "and needs a token id"
                )
            if self.max_sequence_length < 1:
                raise ValueError(
                    f"max_position_embeddings is {self.max_position_embeddings}, "
                    f"position_style 'roberta' needs at least "
                    f"pad_token_id + 2 = {self.pad_token_id + 2}"
                )
        self._validate_selection()

    def _validate_selection(self) -> None:
        if not 0 <= self.selection_strength <= 1:
            raise ValueError(
                f"selection_strength is {self.selection_strength}, a number from 0 to 1 is needed"
            )
        density = self.target_density
        if density is not None and not 0 < density <= 1:
            raise ValueError(f"target_density is {density}, a number above 0 and up to 1 is needed")
        if not 0 <= self.num_learned_global_blocks <= 4:
            raise ValueError(
                f"num_learned_global_blocks is {self.num_learned_global_blocks}, 0 to 4 is allowed"
            )
        head_dim = self.hidden_size // self.num_attention_heads
        if not 0 <= self.residual_rank <= head_dim:
            raise ValueError(
                f"residual_rank is {self.residual_rank}, 0 to hidden_size / num_attention_heads = "
                f"{head_dim} is allowed"
            )
        known = {field.name for field in fields(self)}
        unknown = sorted(n for n in vars(self) if n.startswith("selection_") and n not in known)
        if unknown:
            raise ValueError(
                f"unknown fields {', '.join(unknown)}: this configuration may be from a newer "
                "version of adaptive-longformer"
            )
        if self.attention_pattern in SELECTING_PATTERNS:
            self._validate_adaptive_sizes()
        layers = range(self.num_hidden_layers)
        budgets = [self.num_selected_blocks for _ in layers]
        self._check_per_head("head_budgets", budgets, "num_selected_blocks")
        radii = [_of_layer(self.attention_window, layer_idx) // 2 for layer_idx in layers]
        self._check_per_head("head_windows", radii, "half of attention_window")

    def _check_per_head(self, name: str, most: list[int], meaning: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        is_allowed = len(value) == self.num_hidden_layers and all(
            len(heads) == self.num_attention_heads and all(0 <= n <= limit for n in heads)
            for heads, limit in zip(value, most, strict=True)
        )
        if not is_allowed:
            limits = most[0] if len(set(most)) == 1 else most
            raise ValueError(
                f"{name} is {value}, num_hidden_layers = {self.num_hidden_layers} lists of "
                f"num_attention_heads = {self.num_attention_heads} numbers from 0 to {meaning} = "
                f"{limits} are needed"
            )

    def _validate_adaptive_sizes(self) -> None:
        for name in ("block_size", "query_block_size"):
            value = getattr(self, name)
            if not MIN_BLOCK_SIZE <= value <= MAX_BLOCK_SIZE or value % FAN_OUT:
                raise ValueError(
                    f"{name} is {value}, attention_pattern {self.attention_pattern!r} needs a "
                    f"multiple of {FAN_OUT} from "
                    f"{MIN_BLOCK_SIZE} to {MAX_BLOCK_SIZE}"
                )
        small, large = sorted((self.block_size, self.query_block_size))
        if large % small:
            raise ValueError(
                f"query_block_size is {self.query_block_size} and block_size {self.block_size}: "
                "one must be a multiple of the other"
            )
        if self.selection_candidates < 0:
            raise ValueError(
                f"selection_candidates is {self.selection_candidates}, at least 0 is needed"
            )
        num_blocks = -(-self.max_sequence_length // self.block_size)
        if self.num_selected_blocks > num_blocks:
            raise ValueError(
                f"num_selected_blocks is {self.num_selected_blocks}, at most {num_blocks} is "
                f"allowed: the longest document of {self.max_sequence_length} tokens has no more "
                f"blocks of {self.block_size}"
            )
        narrowest = min(_of_layer(self.attention_window, i) for i in range(self.num_hidden_layers))
        full_budget = self.num_selected_blocks * self.block_size + narrowest
        if self.target_density is not None and self.target_density * full_budget < 2:
            raise ValueError(
                f"target_density is {self.target_density}, at least {2 / full_budget:.2g} can be "
                f"reached: 2 of the {full_budget} keys of the full budget"
            )
        dilations = self.attention_dilation
        if any(d != 1 for d in (dilations if isinstance(dilations, list) else [dilations])):
            raise ValueError(
                f"attention_dilation is {dilations}, "
                f"attention_pattern {self.attention_pattern!r} needs 1"
            )

    def _check_per_layer(self, name: str, needed: str, is_allowed) -> None:
        value = getattr(self, name)
        if isinstance(value, list) and len(value) != self.num_hidden_layers:
            raise ValueError(
                f"{name} has {len(value)} values, one number or "
                f"num_hidden_layers = {self.num_hidden_layers} values are needed"
            )
        for number in value if isinstance(value, list) else [value]:
            if not is_allowed(number):
                raise ValueError(f"{name} is {value}, {needed} is needed (for every layer)")


def _of_layer(value: int | list[int], layer_idx: int) -> int:
    return value[layer_idx] if isinstance(value, list) else value
