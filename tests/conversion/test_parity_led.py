import copy

import pytest
import torch
from checkpoints import grid, in_tolerances
from seq2seq_checkpoints import (
    HEADS,
    assert_equal_gradients,
    compare,
    make_inputs,
    models,
    outputs_of,
)
from transformers.activations import ACT2FN

LENGTHS = (1, 2, 63, 64, 65, 511, 513, 1030)
WINDOWS = (32, 64, (32, 128))
PADDINGS = ("none", "right", "left")
GLOBAL_TOKENS = ("default", "none", "some")
TARGET_LENGTHS = (1, 13, None)
# In tolerances: what a mistake must exceed.
FAR = 100


def cases():
    combinations = grid(
        head=HEADS["led"],
        length=LENGTHS,
        padding=PADDINGS,
        global_tokens=GLOBAL_TOKENS,
        window=WINDOWS,
        target_length=TARGET_LENGTHS,
    )
    # Sorted so that one pair of models serves neighbours.
    return sorted(combinations, key=lambda case: (case[0], str(case[4]), case[1], str(case)))


@pytest.mark.parametrize("head, length, padding, global_tokens, window, target_length", cases())
def test_logits_equal_those_of_led(head, length, padding, global_tokens, window, target_length):
    source, converted = models("led", head, attention_window=window)
    inputs = make_inputs(source.config, head, length, padding, global_tokens, target_length)
    assert compare(source, converted, inputs) <= 1


@pytest.mark.slow
def test_logits_equal_those_of_led_at_4096_tokens():
    source, converted = models("led", "ForConditionalGeneration", attention_window=512)
    inputs = make_inputs(source.config, "ForConditionalGeneration", 4096, "right", "some")
    assert compare(source, converted, inputs) <= 1


def test_logits_equal_without_masks():
    source, converted = models("led", "ForConditionalGeneration")
    inputs = make_inputs(source.config, "ForConditionalGeneration", 130, "right")
    del inputs["attention_mask"], inputs["global_attention_mask"]
    assert compare(source, converted, inputs) <= 1


def test_a_global_mask_may_be_minus_1_on_padding_as_the_tokenizer_of_led_writes_it():
    source, converted = models("led", "ForConditionalGeneration")
    inputs = make_inputs(source.config, "ForConditionalGeneration", 200, "right", "some")
    padding, mask = inputs["attention_mask"] == 0, inputs["global_attention_mask"]
    inputs["global_attention_mask"] = mask.masked_fill(padding, -1)
    assert padding.any()
    assert compare(source, converted, inputs) <= 1
    inputs["global_attention_mask"][0, 5] = -1
    with pytest.raises(ValueError, match="global_attention_mask has the value -1"):
        converted(**inputs)


def test_logits_equal_with_padding_in_the_text():
    source, converted = models("led", "Model")
    inputs = make_inputs(source.config, "Model", 130, "right", "some")
    mask = torch.ones_like(inputs["decoder_input_ids"])
    mask[0, :4] = mask[1, 9:] = 0
    inputs["decoder_attention_mask"] = mask
    with torch.no_grad():
        expected, found = source(**inputs), converted(**inputs)
    # What padding itself attends to is nobody's concern.
    valid = mask == 1
    pairs = [expected.last_hidden_state[valid]], [found.last_hidden_state[valid]]
    assert in_tolerances(*pairs) <= 1


@pytest.mark.parametrize("head", ["Model", "ForConditionalGeneration"])
def test_cached_decoding_equals_that_of_led(head):
    source, converted = models("led", head)
    inputs = make_inputs(source.config, head, 130, "right", "some")
    ids = inputs.pop("decoder_input_ids")
    name = "logits" if head == "ForConditionalGeneration" else "last_hidden_state"
    found = {}
    with torch.no_grad():
        whole = converted(**inputs, decoder_input_ids=ids)[name]
        for model in (source, converted):
            encoder_outputs = model.get_encoder()(**inputs)
            cache, steps = None, []
            for step in range(ids.shape[1]):
                outputs = model(
                    attention_mask=inputs["attention_mask"],
                    encoder_outputs=encoder_outputs,
                    decoder_input_ids=ids[:, step : step + 1],
                    past_key_values=cache,
                    use_cache=True,
                )
                cache = outputs.past_key_values
                steps.append(outputs[name])
            found[model] = torch.cat(steps, dim=1)
    assert in_tolerances([found[source]], [found[converted]]) <= 1
    assert in_tolerances([whole], [found[converted]]) <= 1


def test_loss_equals_that_of_led():
    source, converted = models("led", "ForConditionalGeneration")
    inputs = make_inputs(source.config, "ForConditionalGeneration", 70, "right", "some")
    inputs["labels"] = inputs.pop("decoder_input_ids").clone()
    inputs["labels"][1, 8:] = -100
    with torch.no_grad():
        torch.testing.assert_close(converted(**inputs).loss, source(**inputs).loss)
    source, converted = models("led", "ForQuestionAnswering")
    inputs = make_inputs(source.config, "ForQuestionAnswering", 70, "right", "some")
    inputs.update(start_positions=torch.tensor([2, 40]), end_positions=torch.tensor([7, 12]))
    with torch.no_grad():
        torch.testing.assert_close(converted(**inputs).loss, source(**inputs).loss)


def generate(model, inputs, **options):
    inputs = {name: value for name, value in inputs.items() if "decoder" not in name}
    return model.generate(**inputs, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 4},
        {"num_beams": 4, "no_repeat_ngram_size": 3, "length_penalty": 2.0, "early_stopping": True},
    ],
    ids=["greedy", "beams", "summary"],
)
@pytest.mark.parametrize("global_tokens", ["default", "some"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_equals_that_of_led(options, global_tokens, use_cache):
    source, converted = models("led", "ForConditionalGeneration", varied=True)
    inputs = make_inputs(source.config, "ForConditionalGeneration", 100, "right", global_tokens)
    options = dict(options, max_new_tokens=24, min_new_tokens=12, use_cache=use_cache)
    expected = generate(source, inputs, **options)
    assert torch.equal(generate(converted, inputs, **options), expected)
    assert len(expected.unique()) > 6  # the same token again and again would prove little


@pytest.mark.parametrize("head", HEADS["led"])
@pytest.mark.parametrize("global_tokens, window, length", [("some", 32, 100), ("default", 64, 65)])
def test_gradients_equal_those_of_led(head, global_tokens, window, length):
    source, converted = models("led", head, attention_window=window)
    inputs = make_inputs(source.config, head, length, "right", global_tokens)
    assert_equal_gradients("led", inputs, source, converted)


def scale(model):
    for layer in model.model.encoder.layers:
        layer.attention.query.weight.mul_(1.1)
        layer.attention.query.bias.mul_(1.1)


def decoder_scale(model):
    for layer in model.model.decoder.layers:
        layer.self_attention.scale *= 1.1


def cross_scale(model):
    for layer in model.model.decoder.layers:
        layer.cross_attention.scale *= 1.1


def activation(model):
    for layer in [*model.model.encoder.layers, *model.model.decoder.layers]:
        layer.activation = ACT2FN["gelu_new"]


def wider_window(model):
    config = copy.copy(model.config)
    config.attention_window = config.attention_window + 2
    for layer in model.model.encoder.layers:
        layer.attention.pattern = config.pattern(0)


def same_global_query(model):
    for layer in model.model.encoder.layers:
        layer.attention.query_global.weight.copy_(layer.attention.query.weight)
        layer.attention.query_global.bias.copy_(layer.attention.query.bias)


def encoder_positions(model):
    table = model.model.encoder.embeddings.position_embeddings.weight
    table.copy_(table.roll(1, dims=0))


def decoder_positions(model):
    table = model.model.decoder.embeddings.position_embeddings.weight
    table.copy_(table.roll(1, dims=0))


def pre_norm(model):
    for layer in model.model.decoder.layers:
        layer.normalises_first = True


def no_logits_bias(model):
    model.final_logits_bias.zero_()


MUTANTS = [
    scale,
    decoder_scale,
    cross_scale,
    activation,
    wider_window,
    same_global_query,
    encoder_positions,
    decoder_positions,
    pre_norm,
    no_logits_bias,
]


def pair():
    wider = dict(d_model=64, encoder_layers=3, encoder_ffn_dim=256, decoder_ffn_dim=256)
    return models("led", "ForConditionalGeneration", attention_window=32, **wider)


@pytest.mark.parametrize("mutate", MUTANTS)
def test_a_mistake_is_far_outside_the_tolerance_of_led(mutate):
    source, converted = pair()
    mutant = copy.deepcopy(converted)
    with torch.no_grad():
        mutate(mutant)
    inputs = make_inputs(source.config, "ForConditionalGeneration", 100, "right", "some")
    assert compare(source, converted, inputs) <= 1
    assert compare(source, mutant, inputs) > FAR


def test_a_missing_global_token_is_far_outside_the_tolerance():
    source, converted = pair()
    inputs = make_inputs(source.config, "ForConditionalGeneration", 100, "right", "some")
    fewer = dict(inputs, global_attention_mask=inputs["global_attention_mask"].clone())
    assert fewer["global_attention_mask"][0, 50] == 1
    fewer["global_attention_mask"][0, 50] = 0
    assert compare(source, converted, inputs, fewer) > FAR


def test_a_mask_the_decoder_does_not_see_is_far_outside_the_tolerance():
    source, converted = pair()
    inputs = make_inputs(source.config, "ForConditionalGeneration", 100, "right", "some")
    with torch.no_grad():
        encoded = converted.get_encoder()(
            inputs["input_ids"], inputs["attention_mask"], inputs["global_attention_mask"]
        )
        expected = source(**inputs).logits
        ids = inputs["decoder_input_ids"]
        unmasked = converted(encoder_outputs=encoded, decoder_input_ids=ids).logits
    assert in_tolerances([expected], [unmasked]) > FAR


def test_every_dropped_bias_is_far_outside_the_tolerance():
    source, converted = pair()
    inputs = make_inputs(source.config, "ForConditionalGeneration", 100, "right", "some")
    # A bias of the keys changes no attention probability.
    names = [
        name
        for name, _ in converted.named_parameters()
        if name.endswith("bias") and ".key" not in name and "layers.1" not in name
    ]
    assert len(names) > 20
    with torch.no_grad():
        expected = outputs_of(source, inputs)
        for name in names:
            parameter = converted.get_parameter(name)
            kept = parameter.clone()
            parameter.zero_()
            found = outputs_of(converted, inputs)
            parameter.copy_(kept)
            far = max(in_tolerances([one], [other]) for one, other in zip(expected, found))
            assert far > FAR, name
