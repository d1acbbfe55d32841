import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, Trainer, TrainingArguments

from adaptive_longformer.analysis.sparsity import sparsity_report
from adaptive_longformer.modeling.adaptive_selection import selections, set_selection_strength
from adaptive_longformer.modeling.causal.cache import (
    SelectionLayer,
    SinkWindowLayer,
    causal_cache,
)
from adaptive_longformer.modeling.modeling_adaptive_sparse import AdaptiveSparseForMaskedLM
from adaptive_longformer.modeling.modeling_adaptive_sparse_causal import AdaptiveSparseForCausalLM
from adaptive_longformer.testing import (
    left_padded,
    logits_in_steps,
    tiny_adaptive_model,
    tiny_config,
    tiny_model,
)
from adaptive_longformer.training.adaptive_optimizer import adaptive_parameter_groups
from adaptive_longformer.training.calibration import calibrate
from adaptive_longformer.training.selection_ramp import SelectionRampCallback

VARIANTS = {
    "default": {},
    "few_candidates": dict(selection_candidates=32),
    "sampling": dict(selection_sampling=True, selection_candidates=32),
    "half_strength": dict(selection_strength=0.5),
    "no_sinks": dict(num_sink_tokens=0),
    "many_sinks": dict(num_sink_tokens=20),
    "windows": dict(attention_window=[8, 80]),
    "short_query_blocks": dict(query_block_size=8),
    "long_query_blocks": dict(query_block_size=64),
    "short_key_blocks": dict(block_size=8, query_block_size=32),
}


def causal(variant="default", **overrides):
    """A model that chooses 3 blocks of 16 tokens, with a window of 8 tokens back and 3 sinks."""
    fields = {"attention_window": 16, "num_sink_tokens": 3, "num_selected_blocks": 3}
    fields = {**fields, **VARIANTS[variant], **overrides}
    return tiny_adaptive_model(AdaptiveSparseForCausalLM, **fields)


@torch.no_grad()
def logits_of(model, input_ids, mask=None):
    return model(input_ids, mask, use_cache=False).logits


# In float64, where no two votes are so close that rounding decides between them.
@pytest.mark.parametrize(
    ("variant", "prompt"),
    [
        ("default", 1),
        ("default", 63),
        ("default", 64),
        ("default", 65),
        ("default", 200),
        ("few_candidates", 1),
        ("few_candidates", 64),
        ("sampling", 63),
        ("half_strength", 30),
        ("no_sinks", 1),
        ("many_sinks", 2),
        ("windows", 40),
        ("short_query_blocks", 63),
        ("long_query_blocks", 63),
        ("short_key_blocks", 65),
    ],
)
def test_cached_decoding_equals_recomputation(variant, prompt):
    model = causal(variant).double()
    length = max(130, prompt + 20)
    input_ids, mask = left_padded([length, length - 1, length - 29, 51])
    expected = logits_of(model, input_ids, mask)
    found = logits_in_steps(model, input_ids, mask, range(prompt, length))
    valid = mask == 1
    torch.testing.assert_close(found[valid], expected[valid], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    "variant", ["default", "few_candidates", "sampling", "windows", "short_query_blocks"]
)
def test_several_new_tokens_at_once_equal_recomputation(variant):
    model = causal(variant).double()
    input_ids, mask = left_padded([230, 229, 91])
    expected = logits_of(model, input_ids, mask)
    found = logits_in_steps(model, input_ids, mask, (2, 30, 31, 64, 170, 171, 208))
    valid = mask == 1
    torch.testing.assert_close(found[valid], expected[valid], atol=1e-9, rtol=1e-9)


def test_a_row_may_begin_long_after_the_first_steps():
    """The means of keys that another row begins with are not those of this one."""
    model = causal("few_candidates").double()
    input_ids, mask = left_padded([230, 91])
    expected = logits_of(model, input_ids, mask)
    found = logits_in_steps(model, input_ids, mask, (100, 130, 170, 208))
    valid = mask == 1
    torch.testing.assert_close(found[valid], expected[valid], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("variant", ["default", "few_candidates", "sampling"])
def test_cached_decoding_in_single_precision_equals_recomputation(variant):
    model = causal(variant)
    input_ids, mask = left_padded([150, 90])
    expected = logits_of(model, input_ids, mask)
    found = logits_in_steps(model, input_ids, mask, range(65, 150))
    valid = mask == 1
    torch.testing.assert_close(found[valid], expected[valid], atol=1e-5, rtol=1e-5)


def test_attentions_of_cached_decoding_are_those_of_the_whole():
    model = causal().double()
    input_ids, mask = left_padded([150, 90])
    with torch.no_grad():
        whole = model(input_ids, mask, output_attentions=True).attentions
        assert not any(attention.triu(1).any() for attention in whole)
        cache = model(input_ids[:, :70], mask[:, :70]).past_key_values
        found = model(input_ids[:, 70:], mask, past_key_values=cache, output_attentions=True)
    for expected, attention in zip(whole, found.attentions, strict=True):
        torch.testing.assert_close(attention, expected[:, :, 70:])
        sums = attention.sum(dim=-1)
        torch.testing.assert_close(sums, torch.ones_like(sums))
        # More than sinks and window is read.
        assert not attention.triu(71).any()
        assert attention[0].tril(70 - 9)[:, :, 3:].sum() > 10


@pytest.mark.parametrize("variant", ["default", "few_candidates", "windows", "long_query_blocks"])
@pytest.mark.parametrize("backend", ["auto", "blocked"])
def test_no_token_reaches_an_earlier_one_but_some_reach_far(variant, backend):
    model = causal(variant, attention_backend=backend)
    input_ids, mask = left_padded([300, 291])
    before = logits_of(model, input_ids, mask)
    for changed in (9, 24, 25, 100, 127, 128, 129, 272, 299):
        other_ids = input_ids.clone()
        other_ids[:, changed] = (other_ids[:, changed] - 4) % 92 + 5
        is_reached = (logits_of(model, other_ids, mask) != before).any(dim=-1)
        assert not is_reached[:, :changed].any(), changed
        assert is_reached[:, changed].all()
        if variant == "default" and changed in (100, 127):
            # Two layers of windows carry it 16 tokens.
            assert is_reached[:, changed + 17 :].any(dim=1).all()


@pytest.mark.parametrize(("left", "right"), [(1, 0), (16, 0), (500, 0), (0, 30), (33, 7)])
@pytest.mark.parametrize("variant", ["default", "few_candidates"])
def test_padding_changes_no_token(left, right, variant):
    model = causal(variant).double()
    input_ids, _ = left_padded([210])
    expected = logits_of(model, input_ids)
    padded = torch.nn.functional.pad(input_ids, (left, right), value=1)
    mask = torch.nn.functional.pad(torch.ones_like(input_ids), (left, right))
    found = logits_of(model, padded, mask)[:, left : left + 210]
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


def test_without_strength_it_is_the_source_bit_for_bit_with_its_cache(tmp_path):
    source = tiny_model(AdaptiveSparseForCausalLM, attention_window=16)
    source.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attention_pattern="adaptive").eval()
    input_ids, mask = left_padded([200, 130])
    assert torch.equal(logits_of(model, input_ids, mask), logits_of(source, input_ids, mask))
    steps = range(150, 200)
    found, expected = (logits_in_steps(m, input_ids, mask, steps) for m in (model, source))
    assert torch.equal(found, expected)
    cache = model(input_ids, mask).past_key_values
    assert all(isinstance(layer, SinkWindowLayer) for layer in cache.layers)
    for trained in (source, model):
        trained.train()(input_ids, mask, labels=input_ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if ".adaptive." in name:
            assert not parameter.grad.any(), name
        else:
            assert torch.equal(parameter.grad, source.get_parameter(name).grad), name


@pytest.mark.parametrize("model_class", [AdaptiveSparseForCausalLM, AdaptiveSparseForMaskedLM])
def test_a_checkpoint_of_another_pattern_becomes_adaptive_by_configuration(model_class, tmp_path):
    tiny_model(model_class, attention_window=16).save_pretrained(tmp_path)
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        attention_pattern="adaptive",
        selection_strength=1.0,
        block_size=16,
        query_block_size=16,
        output_loading_info=True,
    )
    assert type(model) is AdaptiveSparseForCausalLM and not any(report.values())
    input_ids, mask = left_padded([200])
    chosen = logits_of(model.eval(), input_ids, mask)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(logits_of(again, input_ids, mask), chosen)
    model.set_selection_strength(0.0)
    assert not torch.allclose(logits_of(model, input_ids, mask), chosen, atol=1e-3)


def generated(model, input_ids, mask, **options):
    return model.generate(
        input_ids=input_ids,
        attention_mask=mask,
        max_new_tokens=24,
        pad_token_id=1,
        eos_token_id=7,
        **options,
    )


@pytest.mark.parametrize(
    "options",
    [{}, dict(num_beams=4, num_return_sequences=3), dict(do_sample=True)],
    ids=["greedy", "beams", "sampling"],
)
def test_generation_is_the_same_with_and_without_a_cache(options):
    model = causal("few_candidates").double()
    input_ids, mask = left_padded([60, 41, 5])
    results = []
    for cache in (dict(cache_implementation="dynamic"), dict(use_cache=False)):
        torch.manual_seed(0)
        results.append(generated(model, input_ids, mask, **options, **cache))
    assert torch.equal(*results)
    assert results[0].shape[1] > 61


def test_every_row_of_a_batch_is_continued_as_if_alone():
    model = causal().double()
    input_ids, mask = left_padded([90, 62])
    together = generated(model, input_ids, mask, min_new_tokens=24)
    for row, length in enumerate((90, 62)):
        alone = generated(model, input_ids[row : row + 1, -length:], None, min_new_tokens=24)
        assert torch.equal(together[row, 90:], alone[0, length:])


def test_generation_reads_the_prompt_in_pieces_and_goes_on_after_it():
    model = causal().double()
    input_ids, mask = left_padded([90, 62])
    expected = generated(model, input_ids, mask, min_new_tokens=24)
    found = generated(model, input_ids, mask, min_new_tokens=24, prefill_chunk_size=25)
    assert torch.equal(found, expected)
    options = dict(pad_token_id=1, eos_token_id=7)
    first = model.generate(
        input_ids, attention_mask=mask, min_new_tokens=12, max_new_tokens=12,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    assert all(isinstance(layer, SelectionLayer) for layer in first.past_key_values.layers)
    rest = model.generate(
        first.sequences, attention_mask=torch.nn.functional.pad(mask, (0, 12), value=1),
        past_key_values=first.past_key_values, min_new_tokens=12, max_new_tokens=12, **options,
    )  # fmt: skip
    assert torch.equal(rest, expected)


def test_prompt_lookup_takes_tokens_back_and_gives_the_greedy_result():
    model = causal().double()
    input_ids, _ = left_padded([50])
    input_ids = torch.cat([input_ids, input_ids], dim=1)
    mask = torch.ones_like(input_ids)
    expected = generated(model, input_ids, mask)
    assert torch.equal(generated(model, input_ids, mask, prompt_lookup_num_tokens=12), expected)


@pytest.mark.parametrize("variant", ["default", "few_candidates"])
def test_tokens_that_were_taken_back_leave_no_trace(variant):
    model = causal(variant).double()
    input_ids, mask = left_padded([200, 150])
    other_ids, _ = left_padded([200, 150], seed=1)
    expected = logits_of(model, input_ids, mask)
    for kept, removed in ((2, 5), (90, 6), (96, 16), (97, 16), (111, 1)):
        cache = causal_cache(model.config)
        wrong = torch.cat([input_ids[:, :kept], other_ids[:, kept : kept + removed]], dim=1)
        for start, end in ((0, kept), *((t, t + 1) for t in range(kept, kept + removed))):
            model(wrong[:, start:end], mask[:, :end], past_key_values=cache)
        cache.crop(-removed)
        with torch.no_grad():
            found = model(input_ids[:, kept:], mask, past_key_values=cache).logits
        valid = mask[:, kept:] == 1
        torch.testing.assert_close(found[valid], expected[:, kept:][valid], atol=1e-9, rtol=1e-9)
    with pytest.raises(ValueError, match="takes back at most query_block_size = 16 tokens at once"):
        cache.crop(-40)


@pytest.mark.parametrize("variant", ["default", "few_candidates"])
def test_rows_of_a_cache_can_be_repeated_and_chosen_and_all_forgotten(variant):
    model = causal(variant).double()
    input_ids, mask = left_padded([100, 75])
    expected = logits_of(model, input_ids, mask)[:, -3:]
    with torch.no_grad():
        cache = model(input_ids[:, :-3], mask[:, :-3]).past_key_values
        model(input_ids[:, -3:-2], mask[:, :-2], past_key_values=cache)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        cache.reorder_cache(torch.tensor([1, 0]))
        found = model(input_ids[:, -2:], mask, past_key_values=cache).logits
        torch.testing.assert_close(found, expected[:, 1:], atol=1e-9, rtol=1e-9)
        cache.reset()
        found = model(input_ids, mask, past_key_values=cache).logits
    assert torch.equal(found[:, -3:], expected)


def test_a_new_token_reads_only_sinks_window_and_its_list():
    model = causal().double()
    input_ids, mask = left_padded([250, 230])
    with torch.no_grad():
        cache = model(input_ids[:, :200], mask[:, :200]).past_key_values
        model(input_ids[:, 200:201], mask[:, :201], past_key_values=cache)
        for layer in cache.layers:
            listed = layer.key_blocks[..., None] * 16 + torch.arange(16)
            listed = listed.flatten(2) + torch.tensor([0, 20])[:, None, None]
            is_read = torch.zeros(2, 4, 201, dtype=torch.bool).scatter_(2, listed, True)
            is_read[:, :, -8:] = is_read[0, :, :3] = is_read[1, :, 20:23] = True
            assert is_read.float().mean() < 0.5
            for kept in (layer.keys, layer.values):
                kept.masked_fill_(~is_read[..., None], torch.nan)
        found = model(input_ids[:, 201:204], mask[:, :204], past_key_values=cache).logits
    expected = logits_of(model, input_ids[:, :204], mask[:, :204])[:, 201:]
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


def test_a_block_chooses_once(monkeypatch):
    from adaptive_longformer.modeling import adaptive_selection as adaptive

    lengths, original = [], adaptive.select_blocks

    def counted(query, key, *args, **kwargs):
        lengths.append(key.shape[2])
        return original(query, key, *args, **kwargs)

    monkeypatch.setattr(adaptive, "select_blocks", counted)
    model = causal(num_hidden_layers=1)
    input_ids, mask = left_padded([100])
    logits_in_steps(model, input_ids, mask, range(70, 100))
    assert lengths == [70, 65, 81, 97]  # the prompt; its last block again; then as blocks begin


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant, monkeypatch):
    from adaptive_longformer.modeling import adaptive_selection as adaptive

    calls, original = [], adaptive.select_blocks

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    model = causal().train()
    input_ids, mask = left_padded([120, 70])

    def gradients():
        model.zero_grad()
        model(input_ids, mask, labels=input_ids).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients()
    for name in ("gate", "budget", "span"):
        assert all(expected[f"model.layers.{i}.attention.adaptive.{name}"].any() for i in (0, 1))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    monkeypatch.setattr(adaptive, "select_blocks", counted)
    found = gradients()
    assert len(calls) == 2  # one per layer
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_trainer_ramps_the_strength_and_the_model_generates_what_it_learned(tmp_path):
    torch.manual_seed(0)
    config = tiny_config(
        attention_pattern="adaptive", attention_window=16, num_sink_tokens=2, block_size=16,
        query_block_size=16, num_selected_blocks=2, target_density=0.8,
    )  # fmt: skip
    model = AdaptiveSparseForCausalLM(config)
    period = torch.arange(10, 17)
    texts = [period.roll(-start).repeat(12)[:80] for start in range(7)] * 4
    data = [{"input_ids": text, "labels": text} for text in texts]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=60, per_device_train_batch_size=4, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(adaptive_parameter_groups(model, 1e-2, multiplier=2.0))
    trainer = Trainer(
        model, arguments, train_dataset=data, callbacks=[SelectionRampCallback()],
        optimizers=(optimizer, None),
    )  # fmt: skip
    trainer.train()
    assert all(part.strength == 1.0 for part in selections(model))
    assert any((part.gate != 1).any() for part in selections(model))
    assert model.config.selection_strength == 1.0
    prompt = period.repeat(3)[None, :20]
    found = model.eval().generate(prompt, max_new_tokens=40, do_sample=False, pad_token_id=1)
    assert torch.equal(found[0], period.repeat(9)[:60])


def test_density_is_added_to_the_loss_in_training():
    model = causal(target_density=0.5)
    input_ids, mask = left_padded([40])
    plain = model(input_ids, mask, labels=input_ids).loss
    for part in selections(model):
        part.price.fill_(3.0)
    assert torch.equal(model(input_ids, mask, labels=input_ids).loss, plain)
    density = torch.stack([part.density() for part in selections(model)]).mean()
    excess = density - 0.5
    loss = model.train()(input_ids, mask, labels=input_ids).loss
    torch.testing.assert_close(loss, plain + (3.0 + excess) * excess)
    # All there is to read: a window of 8 tokens back and 3 blocks of 16.
    part = selections(model)[0]
    with torch.no_grad():
        part.budget.fill_(-1 / 3)
        part.span.fill_(1.0)
        assert float(part.density()) == pytest.approx(8 / (8 + 48))


def test_a_calibrated_model_gives_the_same_with_fewer_keys_also_from_its_cache():
    model = causal(attention_window=[16, 160]).double()
    with torch.no_grad():
        first, second = selections(model)
        first.budget.copy_(torch.tensor([0.1, 0.05, -1.0, 0.05]))
        second.budget.fill_(-0.7)
        second.span.fill_(0.125)
    input_ids, mask = left_padded([200, 120])
    expected = logits_of(model, input_ids, mask)
    result = calibrate(model, [{"input_ids": input_ids, "attention_mask": mask}])
    assert result.head_budgets == [[2, 2, 0, 2], [0, 0, 0, 0]]
    assert result.head_windows == [[8] * 4, [41] * 4]
    assert result.keys_per_query < result.full_keys_per_query
    torch.testing.assert_close(logits_of(model, input_ids, mask), expected)
    found = logits_in_steps(model, input_ids, mask, range(90, 200))
    valid = mask == 1
    torch.testing.assert_close(found[valid], expected[valid], atol=1e-9, rtol=1e-9)


def test_the_sparsity_report_counts_keys_with_weight_in_the_dense_attention():
    model = causal()
    input_ids, mask = left_padded([200, 120])
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    report = sparsity_report(model, inputs, sampled_blocks=100)
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    ordinary = mask.cumsum(dim=1) > 3
    for layer, attention in zip(report.layers, attentions, strict=True):
        counts = (attention > 0).sum(dim=-1).float()  # [batch, heads, length]
        expected = counts.transpose(1, 2)[ordinary].mean()
        assert layer.keys_per_query == pytest.approx(float(expected), rel=1e-3)
        assert layer.global_keys == 3
        assert 0 < layer.missed_mass < 1 and 0 < layer.recall <= 1
    model = causal(num_selected_blocks=64, attention_window=64)
    for part in selections(model):
        for parameter in (part.gate, part.budget, part.span):
            parameter.data.fill_(1.0)
    for layer in sparsity_report(model, inputs).layers:
        assert layer.missed_mass == pytest.approx(0, abs=1e-5)
        assert layer.recall == 1.0


def test_an_adapter_brings_its_selection_to_the_generation_of_a_fresh_base(tmp_path):
    peft = pytest.importorskip("peft")
    causal(selection_strength=0.0).save_pretrained(tmp_path / "base")
    base = AdaptiveSparseForCausalLM.from_pretrained(tmp_path / "base").double()
    input_ids, mask = left_padded([60, 45])
    plain = generated(base, input_ids, mask, min_new_tokens=24)
    options = peft.LoraConfig(task_type="CAUSAL_LM", modules_to_save=["adaptive"])
    model = peft.get_peft_model(base, options)
    set_selection_strength(model, 1.0)
    model.save_pretrained(tmp_path / "adapter")
    fresh = AdaptiveSparseForCausalLM.from_pretrained(tmp_path / "base").double()
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").double().eval()
    found = generated(loaded, input_ids, mask, min_new_tokens=24)
    assert torch.equal(
        found, generated(loaded, input_ids, mask, min_new_tokens=24, use_cache=False)
    )
    assert not torch.equal(found, plain)
    with loaded.disable_adapter():
        assert torch.equal(generated(loaded, input_ids, mask, min_new_tokens=24), plain)


def test_outputs_behind_a_prompt_do_not_depend_on_the_padding_of_others():
    model = causal()
    input_ids, mask = left_padded([80, 60])
    mask[0, 70:] = mask[0, 20:23] = 0  # behind the prompt, and within
    with torch.no_grad():
        together = model(input_ids, mask).logits[0]
        alone = model(input_ids[:1], mask[:1]).logits[0]
    torch.testing.assert_close(together, alone)


def test_a_cache_that_does_not_keep_what_choosing_takes_is_refused():
    model = causal()
    input_ids, mask = left_padded([40])
    for cache in (DynamicCache(), causal_cache(model.config, is_selecting=False)):
        name = type(cache.layers[0]).__name__ if cache.layers else "DynamicLayer"
        with pytest.raises(ValueError, match=f"a layer of type {name}, .* needs a SelectionLayer"):
            model(input_ids, mask, past_key_values=cache)
    with pytest.raises(
        ValueError, match="is 'offloaded', where layers choose blocks allowed are None, 'dynamic'"
    ):
        generated(model, input_ids, mask, cache_implementation="offloaded")


def test_a_cache_for_choices_serves_without_strength_too():
    model = causal().double()
    input_ids, mask = left_padded([100, 60])
    cache = causal_cache(model.config)
    model.set_selection_strength(0.0)
    with torch.no_grad():
        expected = model(input_ids, mask).logits[:, 70:]
        model(input_ids[:, :70], mask[:, :70], past_key_values=cache)
        found = model(input_ids[:, 70:], mask, past_key_values=cache).logits
    valid = mask[:, 70:] == 1
    torch.testing.assert_close(found[valid], expected[valid], atol=1e-9, rtol=1e-9)


def test_gradients_pass_through_the_cache():
    model = causal().double()
    input_ids, mask = left_padded([100])
    whole = model(input_ids, mask).logits
    steps = model(input_ids[:, :70], mask[:, :70])
    second = model(input_ids[:, 70:90], mask[:, :90], past_key_values=steps.past_key_values)
    third = model(input_ids[:, 90:], mask, past_key_values=steps.past_key_values)
    pieces = torch.cat([steps.logits, second.logits, third.logits], dim=1)
    weight = torch.linspace(-1, 1, whole.numel(), dtype=torch.float64).view_as(whole)
    (whole * weight).sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    (pieces * weight).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_a_cache_of_inference_mode_is_continued_outside():
    model = causal("few_candidates")
    input_ids, mask = left_padded([160])
    with torch.inference_mode():
        cache = model(input_ids[:, :100], mask[:, :100]).past_key_values
        model(input_ids[:, 100:120], mask[:, :120], past_key_values=cache)
    with torch.no_grad():
        found = model(input_ids[:, 120:], mask, past_key_values=cache).logits
    expected = logits_of(model, input_ids, mask)[:, 120:]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_learned_blocks_for_all_tokens_are_refused():
    config = tiny_config(attention_pattern="adaptive", num_learned_global_blocks=1)
    with pytest.raises(ValueError, match="num_learned_global_blocks is 1, 0 is needed in a causal"):
        AdaptiveSparseForCausalLM(config)


@pytest.mark.parametrize("pattern", ["random_selection", "oracle"])
def test_controls_that_see_later_tokens_are_refused(pattern):
    with pytest.raises(ValueError, match=f"attention_pattern is '{pattern}', allowed in a causal"):
        AdaptiveSparseForCausalLM(tiny_config(attention_pattern=pattern))


def test_training_compiles_without_graph_breaks():
    torch.compiler.reset()
    model = causal(num_hidden_layers=1).train()
    input_ids, mask = left_padded([100, 91])
    expected = model(input_ids, mask, labels=input_ids)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(input_ids, mask, labels=input_ids)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)
    found.loss.backward()
