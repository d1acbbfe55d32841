"""`generate()` of other models with a cache writes what recomputation without one does."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from adaptive_longformer.modeling.cache_name import CACHE
from adaptive_longformer.modeling.integration.attention_interface import (
    adaptive_sparse_cache,
    adaptive_sparse_options,
)
from adaptive_longformer.testing import randomize_all_parameters

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 400,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
LOCAL = ["sliding_attention", "full_attention"]
CONFIGS = [
    LlamaConfig(**SIZES),
    Qwen2Config(**SIZES),
    Qwen3Config(**SIZES, head_dim=8),
    MistralConfig(**SIZES, sliding_window=16),
    Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=16, layer_types=LOCAL),
]
of_every_model = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
LLAMA = CONFIGS[0]
WINDOW = {"attention_window": 16, "num_global_tokens": 2, "num_selected_blocks": 0}
BLOCKS = {"attention_window": 32, "num_selected_blocks": 2, "block_size": 16}
PROMPT = 90


def model_of(config, options):
    config = type(config)(**config.to_dict())
    config.adaptive_sparse = options
    model = AutoModelForCausalLM.from_config(config, attn_implementation="adaptive_sparse")
    return randomize_all_parameters(model).eval()


def prompt(padded=True):
    """Two rows; under padding they begin their blocks at other slots."""
    ids = torch.randint(5, 97, (2, PROMPT), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :33] = 0
    return ids, mask


@torch.no_grad()
def recomputed(model, ids, mask):
    """The logits behind every token, without a cache."""
    mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    outputs = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    return outputs.logits


def assert_close(actual, expected):
    scale = expected.abs().max().clamp(min=1)
    assert (actual - expected).abs().max() <= 1e-5 * scale


def assert_generates_what_recomputation_does(model, padded=True, **generation):
    ids, mask = prompt(padded)
    found = model.generate(
        ids, attention_mask=mask if padded else None, max_new_tokens=40, do_sample=False,
        output_logits=True, return_dict_in_generate=True, **generation,
    )  # fmt: skip
    expected = recomputed(model, found.sequences[:, :-1], mask)[:, PROMPT - 1 :]
    assert_close(torch.stack(found.logits, dim=1), expected)
    assert torch.equal(found.sequences[:, PROMPT:], expected.argmax(dim=-1))


@of_every_model
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_windows_and_first_tokens_take_any_cache(config, cache, padded):
    model = model_of(config, WINDOW)
    assert_generates_what_recomputation_does(model, padded, cache_implementation=cache)


@of_every_model
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_chosen_blocks_take_a_cache_of_their_own(config, padded):
    model = model_of(config, BLOCKS)
    cache = adaptive_sparse_cache(model.config)
    assert_generates_what_recomputation_does(model, padded, past_key_values=cache)
    if config is LLAMA:
        ids, mask = prompt(padded)
        with adaptive_sparse_options(num_selected_blocks=0):
            without = recomputed(model, ids, mask)
        assert (recomputed(model, ids, mask) - without)[:, -1].abs().max() > 1e-2


@pytest.mark.parametrize("options", [{"selection_candidates": 16}, {"selection_sampling": True}])
def test_other_ways_to_choose_make_no_difference(options):
    """A coarser stage of means of keys that comes first; chances."""
    model = model_of(LLAMA, {**BLOCKS, **options})
    cache = adaptive_sparse_cache(model.config)
    of_last = cache.layers[-1].options
    assert of_last.num_candidates == 16 or of_last.sampling_seed == len(cache.layers) - 1
    assert_generates_what_recomputation_does(model, past_key_values=cache)


@pytest.mark.parametrize("options", [WINDOW, BLOCKS], ids=["window", "blocks"])
def test_many_tokens_at_once_and_tokens_taken_back(options):
    """As in a chat that goes on, chunked reading of a prompt, and assisted generation."""
    model = model_of(LLAMA, options)
    ids, mask = prompt()
    expected = recomputed(model, ids, mask)
    cache = adaptive_sparse_cache(model.config)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)

    @torch.no_grad()
    def read(begin, end):
        logits = model(
            input_ids=ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache,
            position_ids=positions[:, begin:end],
        ).logits  # fmt: skip
        is_token = mask[:, begin:end].bool()
        assert_close(logits[is_token], expected[:, begin:end][is_token])

    for begin, end in ((0, 50), (50, 51), (51, 85)):
        read(begin, end)
    cache.crop(-5)
    read(80, 90)


@pytest.mark.parametrize("options", [WINDOW, BLOCKS], ids=["window", "blocks"])
def test_beam_search_finds_the_same_text(options):
    model = model_of(LLAMA, options)
    ids, mask = prompt()
    settings = dict(attention_mask=mask, max_new_tokens=20, num_beams=3, do_sample=False)
    expected = model.generate(ids, use_cache=False, **settings)
    cache = adaptive_sparse_cache(model.config)
    assert torch.equal(model.generate(ids, past_key_values=cache, **settings), expected)


def test_choosing_blocks_with_another_cache_names_the_one_it_takes():
    model = model_of(LLAMA, BLOCKS)
    ids, _ = prompt()
    for given in ({}, {"cache_implementation": "static"}):
        with pytest.raises(ValueError, match=rf"{CACHE}=adaptive_sparse_cache\(model.config"):
            model.generate(ids, max_new_tokens=3, **given)
    written = model.generate(ids, max_new_tokens=3, use_cache=False)
    assert written.shape == (2, PROMPT + 3)


def test_options_must_be_those_of_the_cache():
    model = model_of(LLAMA, BLOCKS)
    cache = adaptive_sparse_cache(model.config)
    for options in ({"num_selected_blocks": 3}, {"num_selected_blocks": 0}):
        with (
            adaptive_sparse_options(**options),
            pytest.raises(ValueError, match=rf"{CACHE} was made for .*num_blocks=2"),
        ):
            model(input_ids=torch.full((1, 9), 7), past_key_values=cache)


def test_a_mask_of_the_new_tokens_alone_is_refused():
    model = model_of(LLAMA, WINDOW)
    ids, _ = prompt()
    cache = model(input_ids=ids).past_key_values
    assert isinstance(cache, DynamicCache)
    with pytest.raises(
        ValueError, match=f"attention_mask is for 1 tokens, {PROMPT + 1} are needed"
    ):
        model(
            input_ids=ids[:, :1], attention_mask=torch.ones_like(ids[:, :1]), past_key_values=cache
        )
