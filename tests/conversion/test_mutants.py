"""The parity tests can fail: each of these small mistakes is far outside their tolerance."""

import copy
from dataclasses import replace

import pytest
import torch
from checkpoints import compare, make_inputs, models, write_source
from torch import nn
from transformers.activations import ACT2FN

from adaptive_longformer.conversion.convert import convert_checkpoint
from adaptive_longformer.modeling import attention_layer
from adaptive_longformer.patterns import big_bird_layout

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
    wrong = "gelu" if model.config.hidden_act == "gelu_new" else "gelu_new"
    for layer in model.model.layers:
        layer.activation = ACT2FN[wrong]


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


def no_repeated_first_block(layout):
    return replace(layout, bias=None)


def first_block_repeated_once_more(layout):
    bias = layout.bias.exp()
    return replace(layout, bias=torch.where(bias > 1, bias + 1, bias).log())


def not_repeated_for_the_second_block(layout):
    bias = layout.bias.clone()
    bias[:, :, 1] = 0
    return replace(layout, bias=bias)


def not_repeated_for_the_second_to_last_block(layout):
    bias = layout.bias.clone()
    bias[:, :, -2] = 0
    return replace(layout, bias=bias)


def no_last_block_for_the_middle(layout):
    last = layout.num_key_blocks - 1
    keep = layout.key_blocks != last
    keep[:, :, [0, -2, -1]] = True
    return layout.select(keep)


def last_block_reads_no_middle(layout):
    keep = torch.ones_like(layout.key_blocks, dtype=torch.bool)
    keep[:, :, -1, 2:4] = False
    return layout.select(keep)


def no_left_neighbour(layout):
    row = torch.arange(layout.num_query_blocks)[:, None]
    keep = (layout.key_blocks != row - 1) | (layout.key_blocks == 0)
    keep[:, :, -1] = True
    return layout.select(keep)


LAYOUT_MUTANTS = [
    no_repeated_first_block,
    first_block_repeated_once_more,
    not_repeated_for_the_second_block,
    not_repeated_for_the_second_to_last_block,
    no_last_block_for_the_middle,
    last_block_reads_no_middle,
    no_left_neighbour,
]


@pytest.mark.parametrize("mutate", LAYOUT_MUTANTS)
def test_a_mistake_in_the_blocks_is_far_outside_the_tolerance_of_big_bird(mutate, monkeypatch):
    source, converted = pair("big_bird", "ForMaskedLM")
    inputs = make_inputs(source.config, "ForMaskedLM", 200, "right")
    assert compare(source, converted, inputs) <= 1

    def mutant(*args, **kwargs):
        return mutate(big_bird_layout(*args, **kwargs))

    monkeypatch.setattr(attention_layer, "big_bird_layout", mutant)
    assert compare(source, converted, inputs) > FAR


def test_verify_reads_long_inputs_of_big_bird_too(tmp_path, monkeypatch):
    source = write_source(tmp_path / "source", "big_bird", "ForTokenClassification")
    monkeypatch.setattr(
        attention_layer,
        "big_bird_layout",
        lambda *args, **kwargs: no_repeated_first_block(big_bird_layout(*args, **kwargs)),
    )
    with pytest.raises(ValueError, match="verify: the logits differ"):
        convert_checkpoint(source, tmp_path / "target", verify=True)


def not_rescaled(model):
    model.model.embeddings.scale = 1.0


@pytest.mark.parametrize(
    "mutate", [scale, activation, positions_one_too_far, no_token_types, not_rescaled]
)
@pytest.mark.parametrize("length", [100, 200])
def test_a_mistake_is_far_outside_the_tolerance_of_big_bird(mutate, length):
    fields = dict(hidden_size=64, num_hidden_layers=3, intermediate_size=256)
    source, converted = models("big_bird", "ForMaskedLM", rescale_embeddings=True, **fields)
    mutant = copy.deepcopy(converted)
    mutate(mutant)
    inputs = make_inputs(source.config, "ForMaskedLM", length, "right")
    assert compare(source, converted, inputs) <= 1
    assert compare(source, mutant, inputs) > FAR


@pytest.mark.parametrize("head", ["ForQuestionAnswering", "ForSequenceClassification"])
def test_a_wrong_activation_in_the_head_is_far_outside_the_tolerance_of_big_bird(head):
    source, converted = pair("big_bird", head)
    mutant = copy.deepcopy(converted)
    part = mutant.qa_outputs if head == "ForQuestionAnswering" else mutant.classifier
    part.activation = nn.Tanh()
    inputs = make_inputs(source.config, head, 200, "right")
    assert compare(source, converted, inputs) <= 1
    assert compare(source, mutant, inputs) > FAR


@pytest.mark.parametrize("family", ["longformer", "bert", "big_bird"])
def test_every_dropped_bias_is_far_outside_the_tolerance(family):
    source, converted = pair(family, "ForMaskedLM")
    inputs = make_inputs(source.config, "ForMaskedLM", 100, "right", "some")
    for name in biases(family):
        mutant = copy.deepcopy(converted)
        nn.init.zeros_(mutant.get_parameter(name))
        assert compare(source, mutant, inputs) > FAR, name
