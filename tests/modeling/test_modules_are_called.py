"""What is put on a module, or in its place, takes part: its weights are not read past it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from adaptive_longformer import AdaptiveSparseForSequenceClassification
from adaptive_longformer.testing import tiny_model

IDS = torch.arange(5, 65).view(1, -1)


@pytest.fixture
def model():
    model = tiny_model(
        AdaptiveSparseForSequenceClassification,
        separate_global_projections=True,
        default_global_tokens="first",
    )
    return model.eval()


def projections(model):
    """The linear layers of the rows of global tokens, by name."""
    return {name: part for name, part in model.named_modules() if name.endswith("_global")}


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def test_every_linear_layer_is_called_where_someone_listens(model):
    linears = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    called = set()
    for name, part in linears.items():
        part.register_forward_hook(lambda *_, name=name: called.add(name))
    assert projections(model) and logits(model).isfinite().all()
    assert called == set(linears)


def test_hooks_change_nothing_that_they_do_not_mean_to(model):
    expected = logits(model)
    handles = [part.register_forward_hook(lambda *_: None) for part in projections(model).values()]
    assert torch.allclose(logits(model), expected, atol=1e-6)
    for handle in handles:
        handle.remove()
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", ["query_global", "key_global", "value_global"])
def test_an_output_that_a_hook_replaces_is_what_is_read(model, name):
    expected = logits(model)
    part = model.model.layers[0].attention.get_submodule(name)
    part.register_forward_hook(lambda module, inputs, output: -output)
    found = logits(model)
    with torch.no_grad():
        part._forward_hooks.clear()
        part.weight.neg_()
        part.bias.neg_()
    assert torch.allclose(found, logits(model), atol=1e-6)
    assert not torch.allclose(found, expected, atol=1e-4)


def test_a_backward_hook_sees_its_gradient(model):
    seen = []
    part = model.model.layers[0].attention.value_global
    part.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0].norm()))
    model(IDS).logits.sum().backward()
    assert len(seen) == 1 and seen[0] > 0


def test_pruned_and_parametrised_projections_count(model):
    expected = logits(model)
    changed = copy.deepcopy(model)
    for part in projections(model).values():
        prune.l1_unstructured(part, "weight", amount=0.5)
    with torch.no_grad():
        for part, plain in zip(
            projections(model).values(), projections(changed).values(), strict=True
        ):
            plain.weight.copy_(part.weight)
    assert torch.allclose(logits(model), logits(changed), atol=1e-6)
    assert not torch.allclose(logits(model), expected, atol=1e-4)
    for part in projections(changed).values():
        parametrizations.weight_norm(part)
    assert torch.allclose(logits(model), logits(changed), atol=1e-5)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights_give_the_logits_of_the_model_in_memory(model, where, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    expected = logits(model)
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert all(part.weight.is_meta for part in projections(model).values())
    for _ in range(2):
        assert torch.allclose(logits(model), expected, atol=1e-6)
