import math

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from adaptive_longformer.configuration.configuration_adaptive_sparse import AdaptiveSparseConfig
from adaptive_longformer.configuration.presets import Preset
from adaptive_longformer.patterns.fixed import Fixed
from adaptive_longformer.patterns.full import Full
from adaptive_longformer.patterns.random_blocks import RandomBlocks
from adaptive_longformer.patterns.sliding_window import SlidingWindow
from adaptive_longformer.patterns.strided import Strided


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attention_window": 511}, "attention_window is 511, an even number >= 2"),
        ({"attention_window": 0}, "attention_window is 0, an even number >= 2"),
        ({"attention_window": -2}, "attention_window is -2, an even number >= 2"),
        ({"attention_window": [512] * 3}, "attention_window has 3 values.*num_hidden_layers = 12"),
        ({"attention_window": [512] * 11 + [3]}, "attention_window is .*3\\], an even number"),
        ({"attention_dilation": 0}, "attention_dilation is 0, a whole number >= 1"),
        ({"attention_dilation": [1, 2]}, "attention_dilation has 2 values"),
        (
            {"attention_pattern": "window"},
            "attention_pattern is 'window', allowed are 'longformer'",
        ),
        ({"attention_backend": "tpu"}, "attention_backend is 'tpu', allowed are 'auto'"),
        ({"default_global_tokens": "cls"}, "default_global_tokens is 'cls', allowed are 'auto'"),
        ({"position_style": "rotary"}, "position_style is 'rotary', allowed are 'roberta', 'bert'"),
        ({"head_style": "gpt"}, "head_style is 'gpt', allowed are 'roberta', 'bert'"),
        ({"hidden_act": "gelly"}, "hidden_act is 'gelly', allowed are .*'gelu'"),
        ({"hidden_size": 100}, "hidden_size is 100, a multiple of num_attention_heads = 12"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, a whole number >= 1"),
        ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob is 1.5, a probability"),
        ({"classifier_dropout": -0.1}, "classifier_dropout is -0.1, a probability"),
        ({"max_global_tokens": -1}, "max_global_tokens is -1, a number >= 0"),
        ({"pad_token_id": 50265}, "pad_token_id is 50265, None or 0 <= id < vocab_size = 50265"),
        ({"pad_token_id": None}, "pad_token_id is None, position_style 'roberta'"),
        ({"max_position_embeddings": 2}, "max_position_embeddings is 2, .*at least 3"),
        ({"attention_stride": 0}, "attention_stride is 0, a whole number >= 1"),
        ({"initializer_range": -0.1}, "initializer_range is -0.1, a number >= 0"),
        ({"initializer_range": math.inf}, "initializer_range is inf, a number >= 0 and < inf"),
        ({"initializer_range": math.nan}, "initializer_range is nan"),
        ({"layer_norm_eps": -1e-5}, "layer_norm_eps is -1e-05, a number >= 0"),
        ({"num_sink_tokens": 2**31}, "num_sink_tokens is 2147483648, a number >= 0"),
        ({"attention_window": 2**63}, "attention_window is 9223372036854775808, an even number"),
        ({"max_position_embeddings": 2**40}, "max_position_embeddings is .*<= 2147483647"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, .*<= 10000"),
        ({"hidden_size": 12 * 10**6}, "hidden_size = 12000000, .* weights, up to"),
        ({"num_labels": 10**12}, "num_labels is 1000000000000, at most"),
    ],
)
def test_bad_values_name_argument_value_and_what_is_allowed(values, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveSparseConfig(**values)


@pytest.mark.parametrize(
    "values",
    [{"attention_window": "512"}, {"hidden_size": 768.0}, {"separate_global_projections": 1}],
)
def test_bad_types_are_refused(values):
    with pytest.raises(StrictDataclassError, match=next(iter(values))):
        AdaptiveSparseConfig(**values)


def test_values_are_not_changed_by_the_configuration():
    assert AdaptiveSparseConfig(attention_window=64).attention_window == 64
    windows = [32, 64]
    assert (
        AdaptiveSparseConfig(num_hidden_layers=2, attention_window=windows).attention_window
        == windows
    )


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("longformer", SlidingWindow(32, dilation=2)),
        ("sliding_window", SlidingWindow(32, dilation=2)),
        ("full", Full()),
        ("strided", Strided(16)),
        ("fixed", Fixed(16, summary_size=8)),
        ("random_blocks", RandomBlocks(2, 8, seed=1) | SlidingWindow(32, dilation=2)),
    ],
)
def test_pattern_of_a_layer(name, pattern):
    config = AdaptiveSparseConfig(
        num_hidden_layers=2,
        attention_pattern=name,
        attention_window=[32, 64],
        attention_dilation=[1, 2],
        attention_stride=16,
        num_random_blocks=2,
        block_size=8,
    )
    assert config.pattern(1) == pattern


def test_max_sequence_length_leaves_out_the_position_offset():
    assert AdaptiveSparseConfig(max_position_embeddings=4098).max_sequence_length == 4096
    bert = AdaptiveSparseConfig(max_position_embeddings=512, position_style="bert", pad_token_id=0)
    assert bert.max_sequence_length == 512


def test_save_and_load_keeps_every_value(tmp_path):
    config = AdaptiveSparseConfig(
        num_hidden_layers=2, attention_window=[32, 64], classifier_dropout=0.3, num_labels=5
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is AdaptiveSparseConfig
    assert loaded.to_diff_dict() == config.to_diff_dict()


@pytest.mark.parametrize("name", ["tiny", "small", "base", "large", "long-base-16k"])
def test_presets_are_configurations(name):
    config = AdaptiveSparseConfig.from_preset(name, num_labels=7)
    assert config.num_labels == 7


def test_every_preset_serves_a_round_number_of_tokens():
    for member in Preset:
        config = AdaptiveSparseConfig.from_preset(member.name.lower().replace("_", "-"))
        assert config.max_sequence_length % 1024 == 0


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match="preset is 'huge', allowed are 'tiny', 'small'"):
        AdaptiveSparseConfig.from_preset("huge")


def test_overrides_replace_the_values_of_a_preset():
    assert AdaptiveSparseConfig.from_preset("tiny", attention_window=16).attention_window == 16


def adaptive(**fields):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    return AdaptiveSparseConfig(**{**sizes, "attention_pattern": "adaptive", **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"selection_strength": 1.01}, "selection_strength is 1.01, a number from 0 to 1"),
        ({"selection_strength": -0.5}, "selection_strength is -0.5, a number from 0 to 1"),
        ({"target_density": 0.0}, "target_density is 0.0, a number above 0 and up to 1"),
        ({"target_density": 1.5}, "target_density is 1.5, a number above 0 and up to 1"),
        ({"target_density": 0.001}, "target_density is 0.001, at least 0.002 can be reached"),
        ({"num_selected_blocks": 0}, "num_selected_blocks is 0, a whole number >= 1"),
        ({"num_selected_blocks": 257}, "num_selected_blocks is 257, at most 256 is allowed"),
        ({"selection_candidates": 0}, "selection_candidates is 0, a whole number >= 1"),
        ({"num_learned_global_blocks": 5}, "num_learned_global_blocks is 5, 0 to 4"),
        ({"block_size": 30}, "block_size is 30, attention_pattern 'adaptive' needs a multiple"),
        ({"query_block_size": 256}, "query_block_size is 256, attention_pattern 'adaptive'"),
        ({"query_block_size": 24}, "query_block_size is 24, a divisor or a multiple of"),
        ({"attention_dilation": [1, 2]}, r"attention_dilation is \[1, 2\].*needs 1"),
        ({"head_budgets": [[8, 8, 8, 8]]}, r"head_budgets is .*num_hidden_layers = 2 lists"),
        ({"head_budgets": [[33, 8, 8, 8], [0, 0, 0, 0]]}, r"numbers from 0 to .* = 32"),
        ({"head_windows": [[8, 8, 8, 8]]}, r"head_windows is .*num_hidden_layers = 2 lists"),
        ({"head_windows": [[8, 8, 8], [8, 8, 8]]}, r"num_attention_heads = 4 numbers from 0"),
        ({"head_windows": [[257, 8, 8, 8], [0, 0, 0, 0]]}, r"half of attention_window = 256"),
        (
            {"attention_window": [64, 32], "head_windows": [[32] * 4, [-1, 16, 16, 17]]},
            r"half of attention_window = \[32, 16\]",
        ),
        ({"selection_from_the_future": 1}, "unknown fields selection_from_the_future.*newer"),
    ],
)
def test_a_selection_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        adaptive(**fields)


@pytest.mark.parametrize(
    ("fields", "num_blocks"),
    [
        ({}, 32),
        ({"block_size": 64}, 8),
        ({"num_selected_blocks": 3, "block_size": 64}, 3),
        ({"max_position_embeddings": 130}, 8),  # 128 tokens
        ({"max_position_embeddings": 3}, 1),
    ],
)
def test_by_default_a_block_chooses_512_keys_or_what_there_is(fields, num_blocks, tmp_path):
    config = adaptive(**fields)
    assert config.selection_options.num_blocks == num_blocks
    config.save_pretrained(tmp_path)
    loaded = AdaptiveSparseConfig.from_pretrained(tmp_path, attention_window=8)
    assert loaded.selection_options == config.selection_options


def test_selection_fields_reach_the_search_and_are_saved(tmp_path):
    config = adaptive(
        num_selected_blocks=5, block_size=32, query_block_size=16,
        num_learned_global_blocks=2, selection_strength=0.5,
        target_density=0.7, head_budgets=[[5, 0, 1, 2], [3, 3, 3, 3]],
        head_windows=[[256, 0, 1, 2], [3, 3, 3, 3]],
    )  # fmt: skip
    options = config.selection_options
    assert (options.num_blocks, options.block_size, options.query_block_size) == (5, 32, 16)
    assert options.num_global_blocks == 2
    assert config.pattern(0) == SlidingWindow(256)
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()
