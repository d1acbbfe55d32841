import pytest
import torch
from checkpoints import HEADS, make_inputs, models, outputs_of

from adaptive_longformer.conversion.families import FAMILIES


def gradients(model, inputs, name_of):
    """The gradients of a random projection of the outputs, by our names; None counts as zero."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(0)
    total = sum(
        (tensor * torch.randn(tensor.shape, generator=generator)).sum()
        for tensor in outputs_of(model, inputs)
    )
    total.backward()
    return {
        name_of(name): torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }


def layer_of(name):
    parts = name.split(".")
    return ".".join(parts[:3]) if "layers" in parts else parts[0]


def assert_equal_gradients(family, head, inputs, source, converted):
    table = FAMILIES[family].table
    expected = gradients(source, inputs, table.to_target)
    is_base = converted.base_model is converted
    found = gradients(converted, inputs, lambda name: "model." + name if is_base else name)
    # BigBird's heads carry a pooler along that most of them do not read.
    unused = expected.keys() - found.keys()
    assert all(".pooler." in name and not expected.pop(name).any() for name in unused)
    assert expected.keys() == found.keys()
    largest = {}
    for name, gradient in expected.items():
        layer = layer_of(name)
        largest[layer] = max(largest.get(layer, 0.0), gradient.abs().max().item())
    for name, gradient in expected.items():
        difference = (gradient - found[name]).abs().max().item()
        assert difference <= 1e-4 * largest[layer_of(name)], name


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("global_tokens", ["default", "none", "some"])
@pytest.mark.parametrize("window, length", [(32, 100), (64, 65), ((32, 128), 513)])
def test_gradients_equal_those_of_longformer(head, global_tokens, window, length):
    source, converted = models("longformer", head, attention_window=window)
    inputs = make_inputs(source.config, head, length, "right", global_tokens)
    assert_equal_gradients("longformer", head, inputs, source, converted)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ["roberta", "bert"])
@pytest.mark.parametrize("length", [7, 130])
def test_gradients_equal_those_of_roberta_and_bert(family, head, length):
    source, converted = models(family, head)
    inputs = make_inputs(source.config, head, length, "right")
    assert_equal_gradients(family, head, inputs, source, converted)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("length", [100, 200])
def test_gradients_equal_those_of_big_bird(head, length):
    source, converted = models("big_bird", head, rescale_embeddings=True)
    inputs = make_inputs(source.config, head, length, "right")
    assert_equal_gradients("big_bird", head, inputs, source, converted)
