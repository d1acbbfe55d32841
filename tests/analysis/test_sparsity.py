import json

import pytest
import torch

from adaptive_longformer.analysis.sparsity import sparsity_report
from adaptive_longformer.modeling.adaptive_selection import selections
from adaptive_longformer.testing import tiny_adaptive_model, tiny_inputs, tiny_model


def test_keys_are_those_with_weight_in_the_dense_attention():
    model = tiny_adaptive_model()
    inputs = tiny_inputs(model, 300)
    report = sparsity_report(model, inputs, sampled_blocks=100)
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    valid = inputs["attention_mask"] == 1
    ordinary = valid.clone()
    ordinary[:, 0] = False  # the global token reads everything
    for layer, attention in zip(report.layers, attentions):
        counts = (attention > 0).sum(dim=-1).float()  # [batch, heads, length]
        expected = counts.transpose(1, 2)[ordinary].mean()
        assert layer.keys_per_query == pytest.approx(float(expected), rel=1e-3)
        assert 0 < layer.missed_mass < 1 and 0 <= layer.recall <= 1
        assert 0 < layer.selected_blocks <= 4


def test_nothing_is_missed_where_everything_is_read():
    model = tiny_adaptive_model(num_selected_blocks=64, block_size=16, attention_window=128)
    for part in selections(model):
        for parameter in (part.gate, part.budget, part.span):
            parameter.data.fill_(1.0)
    report = sparsity_report(model, tiny_inputs(model, 200, padding="none"))
    for layer in report.layers:
        assert layer.missed_mass == pytest.approx(0, abs=1e-5)
        assert layer.recall == 1.0
        assert layer.keys_per_query == pytest.approx(200, rel=1e-5)


def test_without_strength_only_window_and_global_tokens_are_read():
    model = tiny_adaptive_model(selection_strength=0.0)
    report = sparsity_report(model, tiny_inputs(model, 300, padding="none"))
    for layer in report.layers:
        assert (layer.selected_keys, layer.selected_blocks, layer.global_keys) == (0, 0, 1)
        assert layer.head_budgets == [0] * 4
    assert report.strength == 0
    assert json.loads(json.dumps(report.as_dict()))["layers"][1]["recall"] == 1.0
    assert len(report.table().splitlines()) == 3


def test_models_without_selection_are_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="attention_pattern='adaptive'"):
        sparsity_report(model, tiny_inputs(model))
    with pytest.raises(ValueError, match="sampled_blocks is 0"):
        sparsity_report(tiny_adaptive_model(), tiny_inputs(model), sampled_blocks=0)


def test_the_table_shows_budgets_and_windows_of_all_heads():
    model = tiny_adaptive_model(attention_window=128)
    first, second = selections(model)
    with torch.no_grad():
        first.span.copy_(torch.tensor([1.0, 0.5, 0.25, 0.0]))
        second.budget.fill_(-1.0)
        second.span.fill_(1.0)
    head, *lines = sparsity_report(model, tiny_inputs(model, 300)).table().splitlines()
    column = head.index("budgets"), head.index("windows")
    assert [line[slice(*column)].split() for line in lines] == [["4"] * 4, ["0"] * 4]
    assert [line[column[1] :].split() for line in lines] == [["64", "63", "47", "31"], ["64"] * 4]
