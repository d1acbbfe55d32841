import json

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig

from adaptive_longformer.configuration.configuration_adaptive_sparse_seq2seq import (
    AdaptiveSparseSeq2SeqConfig,
)
from adaptive_longformer.patterns.sliding_window import SlidingWindow


def test_defaults_are_valid_and_survive_saving(tmp_path):
    config = AdaptiveSparseSeq2SeqConfig(attention_window=[64, 32, 64, 64, 64, 64])
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is AdaptiveSparseSeq2SeqConfig
    expected = config.to_dict() | {"_name_or_path": str(tmp_path)}
    assert loaded.to_dict() == expected
    assert json.loads((tmp_path / "config.json").read_text())["d_model"] == 768


def test_encoder_sizes_have_the_names_of_encoders_too():
    config = AdaptiveSparseSeq2SeqConfig(d_model=96, encoder_layers=3, encoder_attention_heads=6)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (96, 3, 6)


def test_pattern_is_that_of_the_encoder_layer():
    config = AdaptiveSparseSeq2SeqConfig(encoder_layers=2, attention_window=[64, 32])
    assert config.pattern(1) == SlidingWindow(16)
    assert config.uses_global_tokens
    assert not AdaptiveSparseSeq2SeqConfig(attention_pattern="full").uses_global_tokens


def test_lengths_are_those_of_the_position_tables():
    config = AdaptiveSparseSeq2SeqConfig(max_encoder_position_embeddings=4096)
    assert config.max_sequence_length == 4096
    assert config.max_decoder_position_embeddings == 1024


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder_layers": 0}, "encoder_layers is 0"),
        ({"decoder_ffn_dim": -1}, "decoder_ffn_dim is -1"),
        ({"d_model": 770}, "d_model is 770.*encoder_attention_heads = 12"),
        ({"decoder_attention_heads": 7}, "d_model is 768.*decoder_attention_heads = 7"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"activation_dropout": -0.1}, "activation_dropout is -0.1"),
        ({"activation_function": "gelly"}, "activation_function is 'gelly', allowed are .*'gelu'"),
        ({"norm_style": "sandwich"}, "norm_style is 'sandwich'.*'post', 'pre'"),
        ({"decoder_start_token_id": 60000}, "decoder_start_token_id is 60000.*50265"),
        ({"pad_token_id": -1}, "pad_token_id is -1"),
        ({"attention_window": 33}, "attention_window is 33.*even"),
        ({"attention_window": [64, 64]}, "attention_window has 2 values.*6"),
        ({"attention_pattern": "dense"}, "attention_pattern is 'dense'"),
        ({"default_global_tokens": "second"}, "default_global_tokens is 'second'"),
        ({"attention_backend": "magic"}, "attention_backend is 'magic'"),
        ({"max_global_tokens": -1}, "max_global_tokens is -1"),
        ({"head_windows": [[64] * 12] * 5}, "head_windows is .*num_hidden_layers = 6 lists"),
        ({"init_std": float("inf")}, "init_std is inf, a number >= 0"),
        ({"decoder_layers": 10**7}, "decoder_layers is 10000000, .*<= 10000"),
        ({"decoder_ffn_dim": 2**30}, "decoder_ffn_dim = 1073741824, .* weights, up to"),
    ],
)
def test_values_out_of_range_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveSparseSeq2SeqConfig(**fields)


def test_wrong_types_are_refused():
    with pytest.raises(StrictDataclassFieldValidationError, match="d_model"):
        AdaptiveSparseSeq2SeqConfig(d_model="wide")
