"""The configuration of the adaptive_sparse_seq2seq encoder-decoder."""

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN

from adaptive_longformer.configuration.configuration_adaptive_sparse import (
    WITHOUT_GLOBAL_TOKENS,
    AdaptiveSparseConfig,
)
from adaptive_longformer.configuration.shared_config import AdaptiveSparseSharedConfig
from adaptive_longformer.patterns.pattern import Pattern
from adaptive_longformer.selection.options import SelectionOptions

NORM_STYLES = ("post", "pre")
POSITIVE = (
    "vocab_size",
    "d_model",
    "encoder_layers",
    "encoder_attention_heads",
    "encoder_ffn_dim",
    "decoder_layers",
    "decoder_attention_heads",
    "decoder_ffn_dim",
    "max_encoder_position_embeddings",
    "max_decoder_position_embeddings",
)
PROBABILITIES = ("dropout", "attention_dropout", "activation_dropout", "classifier_dropout")
# What AdaptiveSparseConfig and this configuration say in the same words, `attribute_map` included.
ENCODER_ATTENTION_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "pad_token_id",
    "attention_pattern",
    "attention_window",
    "attention_dilation",
    "attention_stride",
    "num_random_blocks",
    "block_size",
    "attention_seed",
    "query_block_size",
    "num_selected_blocks",
    "selection_strength",
    "selection_candidates",
    "num_learned_global_blocks",
    "residual_rank",
    "target_density",
    "head_budgets",
    "head_windows",
    "default_global_tokens",
    "separate_global_projections",
    "attention_backend",
    "max_global_tokens",
    "zero_padded_rows",
)


@strict
class AdaptiveSparseSeq2SeqConfig(AdaptiveSparseSharedConfig):
    """Everything that defines an encoder-decoder with a sparse encoder.

    Sizes have the names of BART and LED, the encoder's attention those of `AdaptiveSparseConfig`.

    Args:
        vocab_size: rows of the word embedding table.
        d_model: width of the residual stream, a multiple of both numbers of heads.
        encoder_layers, decoder_layers: number of layers.
        encoder_attention_heads, decoder_attention_heads: heads per layer.
        encoder_ffn_dim, decoder_ffn_dim: width of the feed-forward layers.
        activation_function: activation of the feed-forward layers.
        dropout: dropout after embeddings, attention and feed-forward.
        attention_dropout: dropout of the attention probabilities.
        activation_dropout: dropout inside the feed-forward layers.
        classifier_dropout: dropout of the classification head.
        max_encoder_position_embeddings: the longest document the encoder reads, in tokens.
        max_decoder_position_embeddings: the longest text the decoder reads or writes, in tokens.
        norm_style: "post" normalises the embeddings and after every sublayer (BART, LED), "pre"
            before every sublayer and at the end (Pegasus).
        scale_embedding: whether word embeddings are multiplied by sqrt(d_model).
        use_bias: whether the projections of the attention layers have biases.
        init_std: standard deviation of fresh weights.
        pad_token_id, bos_token_id, eos_token_id, sep_token_id: special tokens.
        decoder_start_token_id: the token every generated text starts with.
        tie_word_embeddings: whether encoder, decoder and language head share one table.
        use_cache: whether the decoder keeps its keys and values for the next token.
        attention_pattern: of the encoder, see `AdaptiveSparseConfig`; the decoder's self-attention
            and cross-attention are full.
        attention_window, attention_dilation, attention_stride, num_random_blocks, block_size,
            attention_seed, query_block_size, num_selected_blocks, selection_strength,
            selection_candidates, num_learned_global_blocks,
            residual_rank, target_density, head_budgets, head_windows,
            separate_global_projections, attention_backend, max_global_tokens, zero_padded_rows: of
            the encoder, see `AdaptiveSparseConfig`.
        default_global_tokens: which tokens of the document are global when no
            `global_attention_mask` is given, see `AdaptiveSparseConfig`. "first" for summaries;
            "none" is what LED does.

    Raises:
        ValueError: a value is out of range; the message names the argument, the value and what is
            allowed.
        StrictDataclassFieldValidationError: a value has the wrong type.
    """

    model_type = "adaptive_sparse_seq2seq"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "d_model",
        "num_hidden_layers": "encoder_layers",
        "num_attention_heads": "encoder_attention_heads",
        "attention_probs_dropout_prob": "attention_dropout",
        "initializer_range": "init_std",
    }

    vocab_size: int = 50265
    d_model: int = 768
    encoder_layers: int = 6
    encoder_attention_heads: int = 12
    encoder_ffn_dim: int = 3072
    decoder_layers: int = 6
    decoder_attention_heads: int = 12
    decoder_ffn_dim: int = 3072
    activation_function: str = "gelu"
    dropout: float | int = 0.1
    attention_dropout: float | int = 0.0
    activation_dropout: float | int = 0.0
    classifier_dropout: float | int = 0.0
    max_encoder_position_embeddings: int = 16384
    max_decoder_position_embeddings: int = 1024
    norm_style: str = "post"
    scale_embedding: bool = False
    use_bias: bool = True
    init_std: float = 0.02
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    sep_token_id: int | None = 2
    decoder_start_token_id: int = 2
    tie_word_embeddings: bool = True
    use_cache: bool = True
    is_encoder_decoder: bool = True
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
    zero_padded_rows: bool = True

    def __post_init__(self, **kwargs) -> None:
        super().__post_init__(**kwargs)
        # Before @strict runs it, which would wrap the ValueError in an exception that is none.
        self.validate_adaptive_sparse_seq2seq()

    @property
    def max_sequence_length(self) -> int:
        """The longest document the encoder's position table serves, in tokens."""
        return self.max_encoder_position_embeddings

    @property
    def uses_global_tokens(self) -> bool:
        """Whether the encoder's pattern takes global tokens at all."""
        return self.attention_pattern not in WITHOUT_GLOBAL_TOKENS

    @property
    def selection_options(self) -> SelectionOptions:
        """How the encoder's layers choose blocks."""
        return self._encoder_attention().selection_options

    def pattern(self, layer_idx: int) -> Pattern:
        """The attention pattern of one encoder layer, without its global tokens."""
        return self._encoder_attention().pattern(layer_idx)

    def validate_adaptive_sparse_seq2seq(self) -> None:
        """Raises ValueError unless all values make sense together."""
        if self.activation_function not in ACT2FN:
            raise ValueError(
                f"activation_function is {self.activation_function!r}, "
                f"allowed are {', '.join(map(repr, ACT2FN))}"
            )
        for name in POSITIVE:
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}, a whole number >= 1 is needed")
        for name in PROBABILITIES:
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}, a probability 0 <= p < 1 is needed")
        if self.norm_style not in NORM_STYLES:
            raise ValueError(
                f"norm_style is {self.norm_style!r}, "
                f"allowed are {', '.join(map(repr, NORM_STYLES))}"
            )
        for name in ("encoder_attention_heads", "decoder_attention_heads"):
            if self.d_model % getattr(self, name):
                raise ValueError(
                    f"d_model is {self.d_model}, "
                    f"a multiple of {name} = {getattr(self, name)} is needed"
                )
        if not 0 <= self.decoder_start_token_id < self.vocab_size:
            raise ValueError(
                f"decoder_start_token_id is {self.decoder_start_token_id}, "
                f"0 <= id < vocab_size = {self.vocab_size} is needed"
            )
        self._encoder_attention()

    def _encoder_attention(self) -> AdaptiveSparseConfig:
        """The same attention in the words of AdaptiveSparseConfig, which checks it."""
        fields = {name: getattr(self, name) for name in ENCODER_ATTENTION_FIELDS}
        return AdaptiveSparseConfig(
            **fields,
            max_position_embeddings=self.max_encoder_position_embeddings,
            position_style="bert",
        )
