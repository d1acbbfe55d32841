"""What an installation must be able to do, through the public names and with nothing downloaded.

The file stands alone: the CI copies it away from the source and runs it on the installed sdist.
"""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BigBirdConfig,
    BigBirdForMaskedLM,
    LEDConfig,
    LEDForConditionalGeneration,
    LongformerConfig,
    LongformerForMaskedLM,
)

import adaptive_longformer
from adaptive_longformer import AdaptiveSparseConfig, AdaptiveSparseModel
from adaptive_longformer.attention.kernels.build import SOURCES

SIZES = dict(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=37,
    max_position_embeddings=260,
)


def randomized(model):
    """The model with every parameter drawn anew."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def input_ids():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, SIZES["vocab_size"], (2, 100), generator=generator)


@pytest.fixture
def longformer():
    """A Longformer whose every tensor is random: default initialisation hides wrong scales."""
    config = LongformerConfig(**SIZES, attention_window=[16, 32], pad_token_id=1)
    return randomized(LongformerForMaskedLM(config).eval())


def test_public_names_exist():
    assert "AdaptiveSparseModel" in adaptive_longformer.__all__
    for name in adaptive_longformer.__all__:
        assert getattr(adaptive_longformer, name) is not None


def test_the_kernels_sources_are_installed():
    assert any((SOURCES / "cpu").glob("*.cpp")) and any((SOURCES / "cuda").glob("*.cu"))


@pytest.mark.parametrize("length", [1, 65, 200])
def test_auto_model_runs_at_any_length(length):
    model = AutoModel.from_config(AdaptiveSparseConfig(**SIZES, attention_window=32)).eval()
    assert type(model) is AdaptiveSparseModel
    with torch.no_grad():
        hidden = model(input_ids=torch.full((2, length), 7)).last_hidden_state
    assert hidden.shape == (2, length, SIZES["hidden_size"])
    assert hidden.isfinite().all()


def test_save_and_load_changes_nothing(tmp_path, input_ids):
    model = AdaptiveSparseModel(AdaptiveSparseConfig(**SIZES, attention_window=32)).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = model(input_ids=input_ids).last_hidden_state
        assert torch.equal(loaded(input_ids=input_ids).last_hidden_state, expected)


def test_converted_longformer_has_the_same_logits(tmp_path, longformer, input_ids):
    longformer.save_pretrained(tmp_path / "source")
    adaptive_longformer.convert_checkpoint(tmp_path / "source", tmp_path / "target")
    converted = AutoModelForMaskedLM.from_pretrained(tmp_path / "target").eval()
    assert type(converted) is adaptive_longformer.AdaptiveSparseForMaskedLM

    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 70:] = 0
    global_attention_mask = torch.zeros_like(input_ids)
    global_attention_mask[:, [0, 40]] = 1
    for masks in (
        {"attention_mask": attention_mask},
        {"attention_mask": attention_mask, "global_attention_mask": global_attention_mask},
    ):
        with torch.no_grad():
            expected = longformer(input_ids=input_ids, **masks).logits[attention_mask.bool()]
            logits = converted(input_ids=input_ids, **masks).logits[attention_mask.bool()]
        assert (logits - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("length", [90, 150])
def test_converted_big_bird_has_the_same_logits(tmp_path, length):
    # Inputs of up to 112 tokens are read in full, longer ones by blocks.
    config = BigBirdConfig(**SIZES, block_size=16, num_random_blocks=1)
    source = randomized(BigBirdForMaskedLM(config).eval())
    source.save_pretrained(tmp_path / "source")
    adaptive_longformer.convert_checkpoint(tmp_path / "source", tmp_path / "target")
    converted = AutoModelForMaskedLM.from_pretrained(tmp_path / "target").eval()
    input_ids = torch.randint(5, 50, (2, length), generator=torch.Generator().manual_seed(0))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 70:] = 0
    with torch.no_grad():
        expected = source(input_ids, attention_mask).logits
        logits = converted(input_ids, attention_mask).logits
    assert (logits - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generation_is_the_same_with_and_without_a_cache(input_ids, options):
    config = AdaptiveSparseConfig(**SIZES, attention_window=32, num_sink_tokens=2)
    model = randomized(AutoModelForCausalLM.from_config(config).eval())
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :60] = 0
    options = dict(attention_mask=attention_mask, max_new_tokens=20, pad_token_id=1, **options)
    cached = model.generate(input_ids, **options)
    assert torch.equal(cached, model.generate(input_ids, use_cache=False, **options))
    assert cached.shape[1] > input_ids.shape[1]


def test_the_cache_has_the_name_of_every_transformers(input_ids):
    config = AdaptiveSparseConfig(**SIZES, attention_window=32, num_sink_tokens=2)
    model = randomized(AutoModelForCausalLM.from_config(config).eval())

    def outputs_after_a_cache(name):
        cache = model(input_ids[:, :60]).past_key_values
        return model(input_ids[:, 60:], **{name: cache})

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # Transformers changed the name
        by_new, by_old = map(outputs_after_a_cache, ("cache", "past_key_values"))
        expected = model(input_ids).logits[:, 60:]
        assert (by_new.logits - expected).abs().max() < 1e-4
        assert torch.equal(by_new.logits, by_old.logits)
        cache = by_new.past_key_values
        with pytest.raises(ValueError, match="cache and past_key_values are the same"):
            model(input_ids, cache=cache, past_key_values=cache)


def test_converted_folder_loads_with_remote_code(tmp_path, longformer):
    longformer.save_pretrained(tmp_path / "source")
    adaptive_longformer.convert_checkpoint(tmp_path / "source", tmp_path / "target")
    script = """
import sys
from transformers import AutoModelForMaskedLM
assert "adaptive_longformer" not in sys.modules
model = AutoModelForMaskedLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(model).__name__, type(model).__module__)
"""
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "target")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
    )
    assert run.returncode == 0, run.stderr
    name, module = run.stdout.split()[-2:]
    assert name == "AdaptiveSparseForMaskedLM"
    assert module.startswith("adaptive_longformer.")


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_converted_led_writes_the_same_text(tmp_path, input_ids, options):
    config = LEDConfig(
        vocab_size=SIZES["vocab_size"],
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=37,
        decoder_ffn_dim=37,
        max_encoder_position_embeddings=256,
        max_decoder_position_embeddings=64,
        attention_window=[16, 32],
    )
    led = LEDForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in led.named_parameters():
            # Strong positions: a random model would write one token for ever.
            scale = 1.5 if "position" in name else 0.15
            is_norm_weight = parameter.ndim == 1 and name.endswith("weight")
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(scale * noise + float(is_norm_weight))
    led.save_pretrained(tmp_path / "source")
    adaptive_longformer.convert_checkpoint(tmp_path / "source", tmp_path / "target")
    converted = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "target").eval()
    assert type(converted) is adaptive_longformer.AdaptiveSparseForConditionalGeneration

    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    inputs["attention_mask"][1, 70:] = 0
    inputs["global_attention_mask"] = torch.zeros_like(input_ids)
    inputs["global_attention_mask"][:, 0] = 1
    options = dict(options, max_new_tokens=20, min_new_tokens=10)
    expected = led.generate(**inputs, **options)
    assert torch.equal(converted.generate(**inputs, **options), expected)
    assert len(expected.unique()) > 4
