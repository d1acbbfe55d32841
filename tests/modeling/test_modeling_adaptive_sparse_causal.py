import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    DynamicCache,
    StaticCache,
    Trainer,
    TrainingArguments,
)

from adaptive_longformer.modeling.cache_name import CACHE
from adaptive_longformer.modeling.causal.cache import SinkWindowLayer, causal_cache
from adaptive_longformer.modeling.modeling_adaptive_sparse import AdaptiveSparseForMaskedLM
from adaptive_longformer.modeling.modeling_adaptive_sparse_causal import AdaptiveSparseForCausalLM
from adaptive_longformer.testing import left_padded, logits_in_steps, tiny_config, tiny_model

PATTERNS = {
    "longformer": {},
    "dilated": dict(attention_dilation=[1, 3]),
    "windows": dict(attention_window=[8, 32]),
    "no_sinks": dict(num_sink_tokens=0),
    "many_sinks": dict(num_sink_tokens=20),
    "sliding_window": dict(attention_pattern="sliding_window"),
    "full": dict(attention_pattern="full"),
    "strided": dict(attention_pattern="strided", attention_stride=8),
    "fixed": dict(attention_pattern="fixed", attention_stride=16),
}
by_pattern = pytest.mark.parametrize("pattern", PATTERNS)


def causal(pattern="longformer", **overrides):
    """A model whose window reaches 8 tokens back, with 3 sinks."""
    fields = {"attention_window": 16, "num_sink_tokens": 3, **PATTERNS[pattern]}
    return tiny_model(AdaptiveSparseForCausalLM, **{**fields, **overrides})


@by_pattern
@pytest.mark.parametrize("prompt", [1, 2, 40])
@pytest.mark.parametrize("plain", [False, True], ids=["own_cache", "DynamicCache"])
def test_cached_decoding_equals_recomputation(pattern, prompt, plain):
    model = causal(pattern)
    input_ids, mask = left_padded([70, 69, 41, 31])
    with torch.no_grad():
        expected = model(input_ids, mask).logits
    cache = DynamicCache() if plain else None
    found = logits_in_steps(model, input_ids, mask, range(prompt, 70), cache)
    valid = mask == 1
    torch.testing.assert_close(found[valid], expected[valid], atol=1e-5, rtol=1e-5)


@by_pattern
def test_several_new_tokens_at_once_equal_recomputation(pattern):
    model = causal(pattern)
    input_ids, mask = left_padded([70, 50])
    with torch.no_grad():
        expected = model(input_ids, mask).logits
    found = logits_in_steps(model, input_ids, mask, (2, 30, 31, 44), None)
    valid = mask == 1
    torch.testing.assert_close(found[valid], expected[valid], atol=1e-5, rtol=1e-5)


@by_pattern
@pytest.mark.parametrize("length, changed", [(50, 20), (1000, 700)])
def test_no_token_reaches_an_earlier_one(pattern, length, changed):
    model = causal(pattern)
    input_ids, mask = left_padded([length, length - 7])
    other_ids = input_ids.clone()
    other_ids[:, changed] = (other_ids[:, changed] + 1) % 97
    with torch.no_grad():
        before, after = (model(ids, mask).logits for ids in (input_ids, other_ids))
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert (before[:, changed] != after[:, changed]).any()


# The chunks of "fixed" are counted in slots, padding included.
@pytest.mark.parametrize("pattern", sorted(set(PATTERNS) - {"fixed"}))
@pytest.mark.parametrize("style", ["roberta", "bert"])
def test_left_padding_changes_no_token(pattern, style):
    model = causal(pattern, position_style=style)
    input_ids, mask = left_padded([60, 33, 5])
    with torch.no_grad():
        logits = model(input_ids, mask).logits
        for row, length in enumerate((60, 33, 5)):
            alone = model(input_ids[row : row + 1, -length:]).logits
            torch.testing.assert_close(logits[row, -length:], alone[0], atol=1e-5, rtol=1e-5)


def test_right_padding_changes_no_token():
    model = causal()
    input_ids, _ = left_padded([60])
    mask = (torch.arange(60) < 40).long()[None]
    with torch.no_grad():
        padded, alone = model(input_ids, mask).logits, model(input_ids[:, :40]).logits
    torch.testing.assert_close(padded[:, :40], alone, atol=1e-5, rtol=1e-5)


def test_the_first_tokens_are_seen_from_everywhere_and_no_others():
    model = causal(num_hidden_layers=1)
    input_ids, mask = left_padded([60, 50])
    with torch.no_grad():
        before = model(input_ids, mask).logits[1]
        for slot in range(10, 20):
            other_ids = input_ids.clone()
            other_ids[1, slot] = (other_ids[1, slot] + 1) % 97
            after = model(other_ids, mask).logits[1]
            reached = (before != after).any(dim=-1)
            expected = torch.zeros(60, dtype=torch.bool)
            expected[slot : None if slot < 13 else slot + 9] = True
            assert torch.equal(reached, expected), slot


@pytest.mark.parametrize("pattern", ["longformer", "sliding_window", "dilated", "many_sinks"])
def test_neither_cache_nor_cost_of_a_window_layer_grows(pattern, monkeypatch):
    model = causal(pattern)
    read = []
    update = SinkWindowLayer.update

    def spy(layer, *args):
        keys, values = update(layer, *args)
        read.append(keys.shape[2])
        return keys, values

    monkeypatch.setattr(SinkWindowLayer, "update", spy)
    input_ids, mask = left_padded([200, 150])
    cache = causal_cache(model.config)
    sizes = []
    with torch.no_grad():
        for start, end in [(0, 100)] + [(step, step + 1) for step in range(100, 200)]:
            model(input_ids[:, start:end], mask[:, :end], past_key_values=cache)
            sizes.append([layer.keys.shape[2] + layer.sink_keys.shape[2] for layer in cache.layers])
    num_sinks = model.config.num_sink_tokens if model.config.uses_global_tokens else 0
    dilations = model.config.attention_dilation
    dilations = dilations if isinstance(dilations, list) else [dilations] * 2
    expected = [8 * dilation + num_sinks for dilation in dilations]
    assert sizes == [expected] * len(sizes)
    assert read[2:] == [size + 1 for size in expected] * 100
    assert cache.get_seq_length() == 200


def generated(model, input_ids, mask, **options):
    return model.generate(
        input_ids, attention_mask=mask, max_new_tokens=30, pad_token_id=1, eos_token_id=7, **options
    )


@pytest.mark.parametrize("pattern", ["longformer", "windows", "full"])
@pytest.mark.parametrize(
    "options",
    [{}, dict(num_beams=4), dict(num_beams=4, num_return_sequences=3), dict(do_sample=True)],
    ids=["greedy", "beams", "several_beams", "sampling"],
)
def test_generation_is_the_same_with_every_cache(pattern, options):
    model = causal(pattern)
    input_ids, mask = left_padded([30, 12, 1])
    results = []
    for cache in ({}, dict(use_cache=False), dict(past_key_values=DynamicCache())):
        torch.manual_seed(0)
        results.append(generated(model, input_ids, mask, **options, **cache))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert results[0].shape[1] > 31


def test_every_row_of_a_batch_is_continued_as_if_alone():
    model = causal()
    input_ids, mask = left_padded([30, 12])
    together = generated(model, input_ids, mask)
    for row, length in enumerate((30, 12)):
        alone = generated(model, input_ids[row : row + 1, -length:], None)[0, length:]
        found = together[row, 30:]
        assert torch.equal(found[: len(alone)], alone)
        assert (found[len(alone) :] == 1).all()


def test_prompt_lookup_takes_tokens_back_and_gives_the_greedy_result():
    model = causal()
    input_ids, _ = left_padded([30])
    input_ids = torch.cat([input_ids, input_ids], dim=1)
    mask = torch.ones_like(input_ids)
    expected = generated(model, input_ids, mask)
    assert torch.equal(generated(model, input_ids, mask, prompt_lookup_num_tokens=3), expected)


def test_the_default_cache_of_generation_is_ours():
    model = causal()
    input_ids, mask = left_padded([30])
    output = generated(model, input_ids, mask, return_dict_in_generate=True)
    assert all(isinstance(layer, SinkWindowLayer) for layer in output.past_key_values.layers)


def test_generation_reads_the_prompt_in_pieces_as_embeddings_or_goes_on_after_it():
    model = causal()
    input_ids, mask = left_padded([30, 12])
    expected = generated(model, input_ids, mask, min_new_tokens=30)
    in_pieces = generated(model, input_ids, mask, min_new_tokens=30, prefill_chunk_size=7)
    assert torch.equal(in_pieces, expected)
    options = dict(min_new_tokens=30, max_new_tokens=30, pad_token_id=1, eos_token_id=7)
    embeddings = model.get_input_embeddings()(input_ids)
    found = model.generate(inputs_embeds=embeddings, attention_mask=mask, **options)
    assert torch.equal(found, expected[:, 30:])
    options = dict(attention_mask=mask, pad_token_id=1, eos_token_id=7)
    first = model.generate(
        input_ids, min_new_tokens=5, max_new_tokens=5, return_dict_in_generate=True, **options
    )
    options["attention_mask"] = torch.nn.functional.pad(mask, (0, 5), value=1)
    rest = model.generate(
        first.sequences, past_key_values=first.past_key_values, min_new_tokens=25,
        max_new_tokens=25, **options,
    )  # fmt: skip
    assert torch.equal(rest, expected)


@by_pattern
def test_a_cache_of_a_fixed_size_gives_the_same_text(pattern):
    model = causal(pattern)
    input_ids, mask = left_padded([30, 21])
    for options in ({}, {"num_beams": 3}):
        found = generated(model, input_ids, mask, cache_implementation="static", **options)
        assert torch.equal(found, generated(model, input_ids, mask, **options))
    cache = StaticCache(config=model.config, max_cache_len=40)
    with torch.no_grad():
        expected = model(input_ids, mask).logits
        model(input_ids[:, :20], mask[:, :20], past_key_values=cache)
        for end, given in ((21, mask[:, :21]), (30, mask)):
            past = int(cache.get_seq_length())
            found = model(input_ids[:, past:end], given, past_key_values=cache).logits
            valid = mask[:, past:end] == 1
            torch.testing.assert_close(found[valid], expected[:, past:end][valid])


def test_decoding_with_a_cache_of_a_fixed_size_is_one_graph():
    model, (input_ids, mask) = causal(), left_padded([30, 21])
    assert model._can_compile_fullgraph
    assert not causal(attention_pattern="adaptive")._can_compile_fullgraph
    torch._dynamo.utils.counters.clear()
    compiled = CompileConfig(fullgraph=True, dynamic=False, backend="eager")
    compiled._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": compiled}
    assert torch.equal(
        generated(model, input_ids, mask, **options), generated(model, input_ids, mask)
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_training_mode_with_gradient_checkpointing_changes_no_text():
    model, (input_ids, mask) = causal(), left_padded([30, 21])
    expected = generated(model, input_ids, mask)
    model.train().gradient_checkpointing_enable()
    assert torch.equal(generated(model, input_ids, mask), expected)
    assert model(input_ids, mask, use_cache=True).past_key_values is None
    with torch.no_grad():
        cache = model(input_ids, mask, use_cache=True).past_key_values
    assert cache.get_seq_length() == 30
    with pytest.raises(ValueError, match="cache holds 30 tokens, none is allowed in"):
        model(input_ids[:, :1], past_key_values=cache)


def test_targets_that_are_shifted_already_take_the_place_of_labels():
    model, (input_ids, mask) = causal(), left_padded([30])
    expected = model(input_ids, mask, labels=input_ids)
    targets = torch.nn.functional.pad(input_ids[:, 1:], (0, 1), value=-100)
    for labels in (None, input_ids.flip(1)):
        outputs = model(input_ids, mask, labels=labels, shift_labels=targets)
        torch.testing.assert_close(outputs.loss, expected.loss)


def test_a_tuple_holds_the_same_as_the_dict():
    model = causal()
    input_ids, mask = left_padded([30])
    expected = model(input_ids, mask, labels=input_ids)
    model.config.return_dict = False
    loss, logits, _ = model(input_ids, mask, labels=input_ids)
    assert torch.equal(loss, expected.loss) and torch.equal(logits, expected.logits)


def test_a_window_cache_takes_no_tokens_back():
    model = causal()
    input_ids, mask = left_padded([30])
    cache = causal_cache(model.config)
    model(input_ids, mask, past_key_values=cache)
    cache.crop(0)
    with pytest.raises(ValueError, match=f"{CACHE}=DynamicCache"):
        cache.crop(-1)


def test_a_cache_can_be_used_again_after_a_reset():
    model = causal()
    input_ids, mask = left_padded([30, 20])
    cache = causal_cache(model.config)
    with torch.no_grad():
        first = model(input_ids, mask, past_key_values=cache).logits
        cache.reset()
        assert torch.equal(model(input_ids, mask, past_key_values=cache).logits, first)


def test_rows_of_a_cache_can_be_repeated_and_chosen():
    model = causal()
    input_ids, mask = left_padded([30, 20])
    with torch.no_grad():
        expected = model(input_ids, mask).logits[:, -1]
        cache = causal_cache(model.config)
        model(input_ids[:, :-1], mask[:, :-1], past_key_values=cache)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        found = model(input_ids[[1, 0], -1:], mask[[1, 0]], past_key_values=cache).logits[:, 0]
    torch.testing.assert_close(found, expected[[1, 0]], atol=1e-5, rtol=1e-5)


def test_generation_beyond_the_position_table_is_an_error():
    model = causal(max_position_embeddings=42)
    input_ids, mask = left_padded([30, 10])
    with pytest.raises(ValueError, match=r"the sequence has 41 tokens, at most .* = 40"):
        generated(model, input_ids, mask, min_new_tokens=20)
    assert generated(model, input_ids[1:, -10:], None, min_new_tokens=30).shape == (1, 40)


def test_padding_needs_no_positions():
    model = causal(max_position_embeddings=42)
    input_ids, mask = left_padded([30, 10])
    wide_ids, wide_mask = F.pad(input_ids, (30, 0), value=1), F.pad(mask, (30, 0))
    with torch.no_grad():
        found, expected = model(wide_ids, wide_mask).logits, model(input_ids, mask).logits
    valid = mask == 1
    torch.testing.assert_close(found[:, 30:][valid], expected[valid], atol=1e-5, rtol=1e-5)


def test_the_loss_is_that_of_the_next_token():
    model = causal()
    input_ids, mask = left_padded([30, 20])
    labels = input_ids.masked_fill(mask == 0, -100)
    output = model(input_ids, mask, labels=labels)
    log_probabilities = output.logits.log_softmax(dim=-1)
    expected = [
        -log_probabilities[row, slot, input_ids[row, slot + 1]]
        for row in range(2)
        for slot in range(29)
        if mask[row, slot + 1]
    ]
    assert len(expected) == 29 + 20
    torch.testing.assert_close(output.loss, torch.stack(expected).mean())
    shared = model(input_ids, mask, labels=labels, num_items_in_batch=100).loss
    torch.testing.assert_close(shared, torch.stack(expected).sum() / 100)


def test_the_last_logits_alone_are_those_of_all():
    model = causal()
    input_ids, mask = left_padded([30, 20])
    every, last = model(input_ids, mask).logits, model(input_ids, mask, logits_to_keep=2).logits
    torch.testing.assert_close(last, every[:, -2:])
    with pytest.raises(ValueError, match="logits_to_keep is 2, 0 is needed with labels"):
        model(input_ids, mask, labels=input_ids, logits_to_keep=2)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant):
    model = causal().train()
    input_ids, mask = left_padded([60, 20])

    def gradients():
        model.zero_grad()
        model(input_ids, mask, labels=input_ids).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients()
    assert all(gradient.abs().sum() > 0 for name, gradient in expected.items() if "key" not in name)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    found = gradients()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_training_makes_no_cache_unless_asked():
    model = causal()
    input_ids, mask = left_padded([20])
    assert model(input_ids, mask).past_key_values is not None
    assert model(input_ids, mask, use_cache=False).past_key_values is None
    assert model.train()(input_ids, mask).past_key_values is None


def test_encoder_and_decoder_load_each_others_weights(tmp_path):
    encoder = tiny_model(AdaptiveSparseForMaskedLM, attention_window=16)
    encoder.save_pretrained(tmp_path / "encoder")
    decoder, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "encoder", output_loading_info=True
    )
    assert type(decoder) is AdaptiveSparseForCausalLM
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, parameter in encoder.named_parameters():
        assert torch.equal(parameter, decoder.get_parameter(name)), name
    decoder.save_pretrained(tmp_path / "decoder")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder").eval()
    input_ids, mask = left_padded([30])
    assert torch.equal(again(input_ids, mask).logits, decoder.eval()(input_ids, mask).logits)
    assert again.lm_head.decoder.weight is again.model.embeddings.word_embeddings.weight


def test_embeddings_in_place_of_ids_give_the_same():
    model = causal()
    input_ids, mask = left_padded([30, 20])
    embeddings = model.get_input_embeddings()(input_ids)
    expected = model(input_ids, mask).logits
    assert torch.equal(model(inputs_embeds=embeddings, attention_mask=mask).logits, expected)


@pytest.mark.parametrize("past", [0, 20])
def test_attentions_are_causal_and_sum_to_1(past):
    model = causal()
    input_ids, mask = left_padded([30, 20])
    cache = DynamicCache()
    if past:
        model(input_ids[:, :past], mask[:, :past], past_key_values=cache)
    output = model(input_ids[:, past:], mask, past_key_values=cache, output_attentions=True)
    assert len(output.attentions) == 2
    for probabilities in output.attentions:
        assert probabilities.shape == (2, 4, 30 - past, 30)
        sums = probabilities.sum(dim=-1)
        valid = (mask == 1)[:, None, past:].expand_as(sums)
        torch.testing.assert_close(sums[valid], torch.ones_like(sums[valid]))
        assert not probabilities.triu(past + 1).any()


@pytest.mark.parametrize("pattern", ["big_bird", "random_blocks"])
def test_a_pattern_that_depends_on_the_length_is_refused(pattern):
    with pytest.raises(ValueError, match=f"attention_pattern is '{pattern}', allowed in a causal"):
        AdaptiveSparseForCausalLM(tiny_config(attention_pattern=pattern))


def test_separate_global_projections_are_refused():
    with pytest.raises(ValueError, match="load it with separate_global_projections=False"):
        AdaptiveSparseForCausalLM(tiny_config(separate_global_projections=True))


def test_a_negative_number_of_sinks_is_refused():
    with pytest.raises(ValueError, match="num_sink_tokens is -1, a number >= 0"):
        tiny_config(num_sink_tokens=-1)


def test_a_mask_of_the_new_tokens_only_is_refused():
    model = causal()
    input_ids, mask = left_padded([30])
    cache = model(input_ids, mask).past_key_values
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 1\), .* = \(1, 31\)"):
        model(input_ids[:, -1:], mask[:, -1:], past_key_values=cache)


def test_trainer_teaches_it_to_continue_and_it_generates_what_it_learned(tmp_path):
    torch.manual_seed(0)
    config = tiny_config(attention_window=16, num_sink_tokens=2)
    model = AdaptiveSparseForCausalLM(config)
    period = torch.arange(10, 17)
    texts = [period.roll(-start).repeat(6)[:36] for start in range(7)] * 8
    data = [{"input_ids": text, "labels": text} for text in texts]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=60,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data[:7])
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.2 < 4 < before
    prompt = period.repeat(2)[None, :10]
    found = model.eval().generate(prompt, max_new_tokens=30, do_sample=False, pad_token_id=1)
    assert torch.equal(found[0], period.repeat(6)[:40])


def test_labels_that_the_trainer_smooths_are_those_of_the_next_token(tmp_path):
    model = causal()
    input_ids = torch.randint(5, 97, (2, 30), generator=torch.Generator().manual_seed(0))
    arguments = TrainingArguments(
        output_dir=str(tmp_path), label_smoothing_factor=0.1, report_to=[], use_cpu=True
    )
    inputs = {"input_ids": input_ids, "labels": input_ids}
    loss = Trainer(model, arguments).compute_loss(model, inputs)
    logits, labels = model(input_ids).logits[:, :-1], input_ids[:, 1:]
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("length", [40, 800])
def test_training_compiles_without_graph_breaks(length):
    torch.compiler.reset()
    model = causal().train()
    input_ids, mask = left_padded([length, length - 9])
    expected = model(input_ids, mask, labels=input_ids)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(input_ids, mask, labels=input_ids)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)
    found.loss.backward()
