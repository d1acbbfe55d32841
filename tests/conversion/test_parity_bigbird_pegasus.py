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
from torch import nn
from transformers.activations import ACT2FN

# Blocks of 16 and 2 random ones: up to 144 tokens are read in full.
LENGTHS = (1, 17, 143, 144, 145, 160, 333, 1030)
PADDINGS = ("none", "right", "left")
USE_BIAS = (False, True)
TARGET_LENGTHS = (1, 13, None)
GENERATING = "ForConditionalGeneration"
# In tolerances: what a mistake must exceed.
FAR = 100


def cases():
    combinations = grid(
        head=HEADS["bigbird_pegasus"],
        length=LENGTHS,
        padding=PADDINGS,
        use_bias=USE_BIAS,
        target_length=TARGET_LENGTHS,
    )
    # Sorted so that one pair of models serves neighbours.
    return sorted(combinations, key=lambda case: (case[0], case[3], case[1], str(case)))


@pytest.mark.parametrize("head, length, padding, use_bias, target_length", cases())
def test_logits_equal_those_of_bigbird_pegasus(head, length, padding, use_bias, target_length):
    source, converted = models("bigbird_pegasus", head, use_bias=use_bias)
    inputs = make_inputs(source.config, head, length, padding, "default", target_length)
    # Its penalty for padding is finite, so that rows of padding in front see something.
    valid = inputs["attention_mask"] == 1 if padding == "left" else None
    assert compare(source, converted, inputs, valid=valid) <= 1


@pytest.mark.parametrize("block_size, num_random_blocks", [(16, 1), (16, 3), (32, 2), (64, 1)])
@pytest.mark.parametrize("length", [703, 705])
def test_logits_equal_with_blocks_of_any_size(block_size, num_random_blocks, length):
    blocks = dict(block_size=block_size, num_random_blocks=num_random_blocks)
    source, converted = models("bigbird_pegasus", GENERATING, **blocks)
    inputs = make_inputs(source.config, GENERATING, length, "right", "default")
    assert compare(source, converted, inputs) <= 1


@pytest.mark.slow
def test_logits_equal_those_of_bigbird_pegasus_at_4096_tokens():
    fields = dict(max_position_embeddings=4096, block_size=64, num_random_blocks=3)
    source, converted = models("bigbird_pegasus", GENERATING, **fields)
    inputs = make_inputs(source.config, GENERATING, 4096, "right", "default")
    assert compare(source, converted, inputs) <= 1


@pytest.mark.parametrize(
    "fields",
    [
        {"attention_type": "original_full"},
        {"scale_embedding": False},
        {"activation_function": "relu"},
    ],
    ids=str,
)
def test_logits_equal_with_other_settings(fields):
    source, converted = models("bigbird_pegasus", GENERATING, **fields)
    inputs = make_inputs(source.config, GENERATING, 333, "right", "default")
    assert compare(source, converted, inputs) <= 1


def test_cached_decoding_equals_that_of_bigbird_pegasus():
    source, converted = models("bigbird_pegasus", GENERATING)
    inputs = make_inputs(source.config, GENERATING, 333, "right", "default")
    ids = inputs.pop("decoder_input_ids")
    found = {}
    with torch.no_grad():
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
                steps.append(outputs.logits)
            found[model] = torch.cat(steps, dim=1)
    assert in_tolerances([found[source]], [found[converted]]) <= 1


@pytest.mark.parametrize("options", [{}, {"num_beams": 4}], ids=["greedy", "beams"])
@pytest.mark.parametrize("length", [100, 333])
def test_generation_equals_that_of_bigbird_pegasus(options, length):
    source, converted = models("bigbird_pegasus", GENERATING, varied=True)
    inputs = make_inputs(source.config, GENERATING, length, "right", "default")
    del inputs["decoder_input_ids"]
    source.get_encoder().set_attention_type("block_sparse")
    options = dict(options, max_new_tokens=24, min_new_tokens=12)
    expected = source.generate(**inputs, **options)
    assert torch.equal(converted.generate(**inputs, **options), expected)
    assert len(expected.unique()) > 6  # the same token again and again would prove little


def test_loss_equals_that_of_bigbird_pegasus():
    for head in HEADS["bigbird_pegasus"][1:]:
        source, converted = models("bigbird_pegasus", head)
        inputs = make_inputs(source.config, head, 333, "right", "default")
        if head == GENERATING:
            inputs["labels"] = inputs.pop("decoder_input_ids").clone()
            inputs["labels"][1, 8:] = -100
        elif head == "ForSequenceClassification":
            inputs["labels"] = torch.tensor([2, 0])
        else:
            inputs.update(start_positions=torch.tensor([2, 40]), end_positions=torch.tensor([7, 1]))
        source.get_encoder().set_attention_type("block_sparse")
        with torch.no_grad():
            torch.testing.assert_close(converted(**inputs).loss, source(**inputs).loss)


@pytest.mark.parametrize("head", HEADS["bigbird_pegasus"])
@pytest.mark.parametrize("length", [100, 333])
def test_gradients_equal_those_of_bigbird_pegasus(head, length):
    source, converted = models("bigbird_pegasus", head)
    inputs = make_inputs(source.config, head, length, "right", "default")
    assert_equal_gradients("bigbird_pegasus", inputs, source, converted)


def no_weight_of_the_first_block(model):
    model.config = copy.deepcopy(model.config)
    for layer in model.model.encoder.layers:
        layer.attention.pattern = type(layer.attention.pattern)(16, 1)


def activation(model):
    for layer in [*model.model.encoder.layers, *model.model.decoder.layers]:
        layer.activation = ACT2FN["gelu"]


def embedding_scale(model):
    model.model.encoder.embeddings.word_embeddings.embed_scale *= 1.1


def decoder_embedding_scale(model):
    model.model.decoder.embeddings.word_embeddings.embed_scale *= 1.1


def post_norm(model):
    for layer in model.model.encoder.layers:
        layer.normalises_first = False


def no_last_norm(model):
    model.model.encoder.final_layer_norm = nn.Identity()


def positions(model):
    table = model.model.decoder.embeddings.position_embeddings.weight
    table.copy_(table.roll(1, dims=0))


MUTANTS = [
    no_weight_of_the_first_block,
    activation,
    embedding_scale,
    decoder_embedding_scale,
    post_norm,
    no_last_norm,
    positions,
]


def pair():
    wider = dict(d_model=64, encoder_layers=3, encoder_ffn_dim=512, decoder_ffn_dim=512)
    return models("bigbird_pegasus", GENERATING, **wider)


@pytest.mark.parametrize("mutate", MUTANTS)
def test_a_mistake_is_far_outside_the_tolerance_of_bigbird_pegasus(mutate):
    source, converted = pair()
    mutant = copy.deepcopy(converted)
    with torch.no_grad():
        mutate(mutant)
    inputs = make_inputs(source.config, GENERATING, 333, "right", "default")
    assert compare(source, converted, inputs) <= 1
    assert compare(source, mutant, inputs) > FAR


def test_every_dropped_bias_is_far_outside_the_tolerance():
    source, converted = pair()
    inputs = make_inputs(source.config, GENERATING, 160, "right", "default")
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


def test_training_draws_random_blocks_that_checkpointing_draws_again():
    _, converted = models("bigbird_pegasus", GENERATING, dropout=0.0)
    model = copy.deepcopy(converted).train()
    inputs = make_inputs(model.config, GENERATING, 333, "right", "default")
    step = model.model.encoder.random_step.count
    encode = model.get_encoder()
    document = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    first, second = (encode(**document).last_hidden_state for _ in range(2))
    assert step == 2 and not torch.equal(first, second)
    gradients = []
    for checkpointed in (False, True):
        step.fill_(5)
        model.zero_grad()
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(**inputs).logits.square().sum().backward()
        assert step == 6
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-5)
