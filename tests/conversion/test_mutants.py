"""The parity tests can fail: each of these small mistakes is far outside their tolerance."""

import copy

import pytest
import torch
from checkpoints import compare, make_inputs, models
from torch import nn
from transformers.activations import ACT2FN

# In tolerances: what a mistake must exceed.
FAR = 100
HEADS = ("ForMaskedLM", "ForTokenClassification")


def pair(family, head):
    fields = dict(hidden_size=64, num_hidden_layers=3, intermediate_size=256)
    if family == "longformer":
        fields["attention_window"] = 32
    return models(family, head, **fields)


def scale(model):
    with torch.no_grad():
        for layer in model.model.layers:
            layer.attention.query.weight.mul_(1.1)
            layer.attention.query.bias.mul_(1.1)


def activation(model):
    for layer in model.model.layers:
        layer.activation = ACT2FN["gelu_new"]


def window(model):
    for layer in model.model.layers:
        radius = layer.attention.config.attention_window // 2
        layer.attention.config = copy.copy(layer.attention.config)
        layer.attention.config.attention_window = 2 * (radius + 1)
        layer.attention.pattern = layer.attention.config.pattern(0)


def same_global_query(model):
    with torch.no_grad():
        for layer in model.model.layers:
            layer.attention.query_global.weight.copy_(layer.attention.query.weight)
            layer.attention.query_global.bias.copy_(layer.attention.query.bias)


def positions_one_too_far(model):
    with torch.no_grad():
        table = model.model.embeddings.position_embeddings.weight
        table.copy_(table.roll(1, dims=0))


def no_token_types(model):
    with torch.no_grad():
        table = model.model.embeddings.token_type_embeddings.weight
        table[1] = table[0]


MUTANTS = [scale, activation, window, same_global_query, positions_one_too_far, no_token_types]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("mutate", MUTANTS)
def test_a_mistake_is_far_outside_the_tolerance_of_longformer(mutate, head):
    source, converted = pair("longformer", head)
    mutant = copy.deepcopy(converted)
    mutate(mutant)
    inputs = make_inputs(source.config, head, 100, "right", "some")
    assert compare(source, converted, inputs) <= 1
    assert compare(source, mutant, inputs) > FAR


@pytest.mark.parametrize("family", ["roberta", "bert"])
@pytest.mark.parametrize("mutate", [scale, activation, positions_one_too_far, no_token_types])
def test_a_mistake_is_far_outside_the_tolerance_of_bert(mutate, family):
    source, converted = pair(family, "ForMaskedLM")
    mutant = copy.deepcopy(converted)
    mutate(mutant)
    inputs = make_inputs(source.config, "ForMaskedLM", 100, "right")
    assert compare(source, converted, inputs) <= 1
    assert compare(source, mutant, inputs) > FAR


@pytest.mark.parametrize("head", HEADS)
def test_a_missing_global_token_is_far_outside_the_tolerance(head):
    source, converted = pair("longformer", head)
    inputs = make_inputs(source.config, head, 100, "right", "some")
    fewer = dict(inputs, global_attention_mask=inputs["global_attention_mask"].clone())
    fewer["global_attention_mask"][0, 50] = 0
    assert inputs["global_attention_mask"][0, 50] == 1
    assert compare(source, converted, inputs, fewer) > FAR


def biases(family):
    """The parameters that can be dropped: a bias of the keys changes no attention probability."""
    _, converted = pair(family, "ForMaskedLM")
    return [
        name
        for name, _ in converted.named_parameters()
        if name.endswith("bias") and ".key" not in name and "layers.1" not in name
    ]


@pytest.mark.parametrize("family", ["longformer", "bert"])
def test_every_dropped_bias_is_far_outside_the_tolerance(family):
    source, converted = pair(family, "ForMaskedLM")
    inputs = make_inputs(source.config, "ForMaskedLM", 100, "right", "some")
    for name in biases(family):
        mutant = copy.deepcopy(converted)
        nn.init.zeros_(mutant.get_parameter(name))
        assert compare(source, mutant, inputs) > FAR, name
