import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BartConfig,
    BartModel,
    BertConfig,
    DebertaV2Config,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    MPNetConfig,
    RobertaConfig,
)

from adaptive_longformer.modeling.integration.attention_interface import (
    adaptive_sparse_attention_forward,
    adaptive_sparse_mask,
    adaptive_sparse_options,
)
from adaptive_longformer.testing import randomize_all_parameters

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 1100,
}
BERT = BertConfig(**SIZES)
ROBERTA = RobertaConfig(**SIZES)
LLAMA = LlamaConfig(**SIZES, num_key_value_heads=2, use_cache=False)
MISTRAL = MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=16, use_cache=False)
MODERNBERT = ModernBertConfig(
    **SIZES, local_attention=32, global_attn_every_n_layers=2, pad_token_id=0, bos_token_id=1,
    eos_token_id=2, cls_token_id=1, sep_token_id=2,
)  # fmt: skip
WIDER = {"mistral": {"sliding_window": 17}, "modernbert": {"local_attention": 34}}


def foreign_model(config, attn_implementation, **options):
    config = type(config)(**config.to_dict())
    if attn_implementation == "adaptive_sparse":
        config.adaptive_sparse = options
    auto = (
        AutoModelForCausalLM if config.model_type in ("llama", "mistral") else AutoModelForMaskedLM
    )
    model = auto.from_config(config, attn_implementation=attn_implementation)
    return randomize_all_parameters(model).eval()


def logits_of(model, length, padding):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 97, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    if padding == "right":
        mask[1, length - length // 3 :] = 0
    elif padding == "left":
        mask[1, : length // 3] = 0
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits[mask.bool()]


@pytest.mark.parametrize("config", [BERT, ROBERTA, LLAMA], ids=lambda config: config.model_type)
@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 800])
def test_window_over_everything_equals_eager(config, padding, length):
    ours = foreign_model(config, "adaptive_sparse", attention_window=2 * length)
    eager = foreign_model(config, "eager")
    expected = logits_of(eager, length, padding)
    difference = (logits_of(ours, length, padding) - expected).abs().max()
    assert difference <= 1e-5 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("config", [BERT, LLAMA], ids=lambda config: config.model_type)
def test_narrow_window_differs_from_eager(config):
    options = {"attention_window": 8, "num_global_tokens": 0, "num_selected_blocks": 0}
    ours = foreign_model(config, "adaptive_sparse", **options)
    expected = logits_of(foreign_model(config, "eager"), 64, "none")
    assert (logits_of(ours, 64, "none") - expected).abs().max() > 1e-2


def test_padding_beside_the_window_changes_nothing():
    model = foreign_model(LLAMA, "adaptive_sparse", attention_window=16, num_global_tokens=2)
    ids = torch.randint(5, 97, (1, 50))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        padded = torch.nn.functional.pad(ids, (0, 20))
        mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 20))
        logits = model(input_ids=padded, attention_mask=mask).logits[:, :50]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_causal_model_does_not_see_later_tokens():
    model = foreign_model(LLAMA, "adaptive_sparse", attention_window=16, num_global_tokens=4)
    ids = torch.randint(5, 97, (1, 80))
    changed = ids.clone()
    changed[0, 50:] = 5
    with torch.no_grad():
        before, after = model(input_ids=ids).logits, model(input_ids=changed).logits
    assert torch.equal(before[:, :50], after[:, :50])


@pytest.mark.parametrize("config", [BERT, LLAMA], ids=lambda config: config.model_type)
def test_training_with_dropout_reaches_every_parameter(config):
    config = type(config)(**config.to_dict())
    config.attention_dropout = config.attention_probs_dropout_prob = 0.1
    model = foreign_model(config, "adaptive_sparse", attention_window=16).train()
    ids = torch.randint(5, 97, (2, 40))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_cross_attention_is_refused_at_any_length():
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4}
    config = BartConfig(vocab_size=97, d_model=32, decoder_attention_heads=4, **sizes)
    model = BartModel._from_config(config, attn_implementation="adaptive_sparse")
    ids = torch.full((1, 9), 7)
    assert model.encoder(ids).last_hidden_state.shape == (1, 9, 32)
    for length in (9, 5):
        with pytest.raises(NotImplementedError, match="cross-attention of BartAttention"):
            model(ids, decoder_input_ids=ids[:, :length])


@pytest.mark.parametrize("config", [DebertaV2Config, MPNetConfig])
def test_a_model_that_would_ignore_it_is_refused(config):
    with pytest.raises(ValueError, match="computes its attention itself and would ignore it"):
        foreign_model(config(**SIZES), "adaptive_sparse")


@pytest.mark.parametrize("config", [BERT, LLAMA], ids=lambda config: config.model_type)
def test_the_choice_survives_saving_and_loading(config, tmp_path):
    options = {"attention_window": 8, "num_global_tokens": 0, "num_selected_blocks": 0}
    model = foreign_model(config, "adaptive_sparse", **options)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(loaded, 64, "left"), logits_of(model, 64, "left"))
    dense = type(model).from_pretrained(tmp_path, attn_implementation="sdpa")
    assert (logits_of(dense, 64, "none") - logits_of(model, 64, "none")).abs().max() > 1e-2
    loaded.set_attn_implementation("sdpa")
    loaded.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(again, 64, "none"), logits_of(dense, 64, "none"))


def test_generation_without_cache_equals_eager():
    ids = torch.randint(5, 97, (1, 20))
    texts = [
        foreign_model(LLAMA, name, **options).generate(
            ids, max_new_tokens=5, do_sample=False, use_cache=False, pad_token_id=0
        )
        for name, options in (("eager", {}), ("adaptive_sparse", {"attention_window": 64}))
    ]
    assert torch.equal(*texts)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("config", [MISTRAL, MODERNBERT], ids=lambda config: config.model_type)
def test_a_layers_own_sliding_window_stays_what_it_is(config, padding):
    """All layers of this Mistral are local; ModernBERT's global layers read everything here."""
    ours = foreign_model(config, "adaptive_sparse", attention_window=400, num_global_tokens=0)
    expected = logits_of(foreign_model(config, "eager"), 150, padding)
    scale = expected.abs().max().clamp(min=1)
    assert (logits_of(ours, 150, padding) - expected).abs().max() <= 1e-5 * scale
    wider = type(config)(**{**config.to_dict(), **WIDER[config.model_type]})
    other = logits_of(foreign_model(wider, "adaptive_sparse", attention_window=400), 150, padding)
    assert (other - expected).abs().max() > 1e-3 * scale


def test_packed_sequences_are_refused():
    model = foreign_model(LLAMA, "adaptive_sparse")
    positions = torch.cat([torch.arange(10), torch.arange(10)])[None]
    with pytest.raises(NotImplementedError, match="packed sequences"):
        model(input_ids=torch.randint(5, 97, (1, 20)), position_ids=positions)


def test_dense_masks_are_refused():
    model = foreign_model(BERT, "adaptive_sparse")
    with pytest.raises(NotImplementedError, match=r"attention_mask of shape \(1, 1, 9, 9\)"):
        model(input_ids=torch.full((1, 9), 7), attention_mask=torch.ones(1, 1, 9, 9))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"softcap": 30.0}, "soft-capped scores"),
        ({"s_aux": torch.zeros(4)}, "attention sinks"),
        ({"position_bias": torch.zeros(1, 4, 9, 9)}, "position bias"),
        ({"output_attentions": True}, "attention probabilities"),
    ],
)
def test_unsupported_wishes_are_refused(extra, message):
    module = foreign_model(BERT, "adaptive_sparse").bert.encoder.layer[0].attention.self
    query = torch.randn(1, 4, 9, 8)
    with pytest.raises(NotImplementedError, match=message):
        adaptive_sparse_attention_forward(module, query, query, query, None, **extra)
    output, weights = adaptive_sparse_attention_forward(
        module, query, query, query, None, softcap=None, output_attentions=False
    )
    assert output.shape == (1, 9, 4, 8)
    assert weights is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 4}, r"unknown options \['window'\], allowed are \['attention_window'"),
        ({"attention_window": 7}, r"\['attention_window'\] is 7, an even number >= 2"),
        ({"num_global_tokens": -1}, r"\['num_global_tokens'\] is -1, a whole number >= 0"),
        ({"selection_candidates": 0}, r"\['selection_candidates'\] is 0, a whole number >= 1"),
        ({"selection_sampling": 1}, r"\['selection_sampling'\] is 1, True or False"),
        ({"block_size": 16.0}, r"\['block_size'\] is 16.0, a whole number >= 1"),
    ],
)
def test_wrong_options_name_what_is_allowed(options, message):
    model = foreign_model(BERT, "adaptive_sparse", **options)
    with pytest.raises(ValueError, match=message):
        model(input_ids=torch.full((1, 9), 7))


def test_mask_function_keeps_the_padding_mask():
    mask = torch.tensor([[True, False]])
    assert torch.equal(adaptive_sparse_mask(1, 2, 2, attention_mask=mask), mask)
    assert adaptive_sparse_mask(1, 2, 2) is None


EVERY_BLOCK = {"num_selected_blocks": 12, "block_size": 16, "query_block_size": 16}


@pytest.mark.parametrize("config", [BERT, LLAMA], ids=lambda config: config.model_type)
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_choosing_every_block_equals_eager(config, padding):
    """Grouped-query heads included. Under causality the window reaches over the own blocks."""
    ours = foreign_model(config, "adaptive_sparse", attention_window=80, **EVERY_BLOCK)
    narrow = foreign_model(config, "adaptive_sparse", attention_window=80, num_selected_blocks=0)
    expected = logits_of(foreign_model(config, "eager"), 150, padding)
    scale = expected.abs().max().clamp(min=1)
    assert (logits_of(ours, 150, padding) - expected).abs().max() <= 1e-5 * scale
    assert (logits_of(narrow, 150, padding) - expected).abs().max() > 1e-3 * scale


@pytest.mark.parametrize("config", [BERT, LLAMA], ids=lambda config: config.model_type)
def test_few_candidates_leave_less_to_choose_from(config):
    def logits(**options):
        options = {**EVERY_BLOCK, "attention_window": 16, **options}
        return logits_of(foreign_model(config, "adaptive_sparse", **options), 192, "none")

    assert torch.equal(logits(selection_candidates=96), logits())
    assert (logits(selection_candidates=16) - logits()).abs().max() > 1e-3


def test_the_choice_of_a_causal_model_does_not_see_later_tokens():
    options = {**EVERY_BLOCK, "num_selected_blocks": 2}
    model = foreign_model(LLAMA, "adaptive_sparse", attention_window=32, **options)
    ids = torch.randint(5, 97, (1, 160))
    changed = ids.clone()
    changed[0, 100:] = 5
    with torch.no_grad():
        before, after = model(input_ids=ids).logits, model(input_ids=changed).logits
    assert torch.equal(before[:, :100], after[:, :100])


def test_options_of_a_context_hold_for_its_time():
    model = foreign_model(BERT, "adaptive_sparse", attention_window=16, num_selected_blocks=0)
    other = foreign_model(BERT, "adaptive_sparse", attention_window=64, num_selected_blocks=0)
    alone = logits_of(model, 100, "none")
    with adaptive_sparse_options(attention_window=64):
        assert torch.equal(logits_of(model, 100, "none"), logits_of(other, 100, "none"))
    assert torch.equal(logits_of(model, 100, "none"), alone)
    with (
        pytest.raises(ValueError, match="num_selected_blocks'\\] is -1"),
        adaptive_sparse_options(num_selected_blocks=-1),
    ):
        pass
