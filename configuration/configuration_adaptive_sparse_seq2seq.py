"""The configuration of the adaptive_sparse_seq2seq encoder-decoder."""

import math

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN

from adaptive_longformer.configuration.shared_config import AdaptiveSparseSharedConfig


@strict
class AdaptiveSparseSeq2SeqConfig(AdaptiveSparseSharedConfig):
    """Everything that defines an encoder-decoder with a sparse encoder; sizes as in BART and LED.

    Args:
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
        decoder_start_token_id: the token every generated text starts with.
        kwargs: everything else is in `AdaptiveSparseSharedConfig`. The attention is the encoder's;
            the decoder's self-attention and cross-attention are full.

    Raises:
        ValueError: a value is out of range; the message names the argument, the value and what is
            allowed.
        StrictDataclassFieldValidationError: a value has the wrong type.
    """

    model_type = "adaptive_sparse_seq2seq"
    keys_to_ignore_at_inference = ["cache", "past_key_values", "encoder_last_hidden_state"]
    attribute_map = {
        "hidden_size": "d_model",
        "num_hidden_layers": "encoder_layers",
        "num_attention_heads": "encoder_attention_heads",
        "attention_probs_dropout_prob": "attention_dropout",
        "initializer_range": "init_std",
    }

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
    decoder_start_token_id: int = 2
    is_encoder_decoder: bool = True

    def __post_init__(self, **kwargs) -> None:
        super().__post_init__(**kwargs)
        # Before @strict runs it, which would wrap the ValueError in an exception that is none.
        self.validate_adaptive_sparse_seq2seq()

    @property
    def max_sequence_length(self) -> int:
        """The longest document the encoder's position table serves, in tokens."""
        return self.max_encoder_position_embeddings

    def validate_adaptive_sparse_seq2seq(self) -> None:
        """Raises ValueError unless all values make sense together."""
        positions = self.max_encoder_position_embeddings + self.max_decoder_position_embeddings
        width, inner = 4 * self.d_model, 2 * self.encoder_ffn_dim  # per row of an encoder's layer
        rows = self.vocab_size + positions + self.encoder_layers * (width + inner)
        rows += self.decoder_layers * (2 * width + 2 * self.decoder_ffn_dim)
        self._check_values(
            choices={"activation_function": tuple(ACT2FN), "norm_style": ("post", "pre")},
            counts=(
                "d_model", "encoder_attention_heads", "encoder_ffn_dim", "decoder_attention_heads",
                "decoder_ffn_dim", "max_encoder_position_embeddings",
                "max_decoder_position_embeddings",
            ),
            layers=("encoder_layers", "decoder_layers"),
            probabilities=(
                "dropout", "attention_dropout", "activation_dropout", "classifier_dropout",
            ),
            from_zero={"init_std": math.inf, "decoder_start_token_id": self.vocab_size},
            weights=rows * self.d_model,
        )  # fmt: skip
        self._check_heads("d_model", "encoder_attention_heads", "decoder_attention_heads")
        self._check_selection()
