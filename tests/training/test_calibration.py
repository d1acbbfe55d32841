import pytest
import torch

from adaptive_longformer.modeling.adaptive import selections
from adaptive_longformer.modeling.modeling_adaptive_sparse import AdaptiveSparseModel
from adaptive_longformer.testing import tiny_adaptive_model, tiny_inputs, tiny_model
from adaptive_longformer.training.calibration import calibrate


def narrowed_model():
    """Budgets of at most 3 blocks in the first layer and none in the second, narrow windows."""
    model = tiny_adaptive_model()
    first, second = selections(model)
    with torch.no_grad():
        first.budget.copy_(torch.tensor([0.3, 0.1, -1.0, 0.05]))
        first.gate.copy_(torch.tensor([0.9, 0.5, 0.9, 0.0]))
        second.budget.fill_(-0.6)
        second.span.fill_(-3.0)
    return model


def test_a_calibrated_model_gives_the_same_with_fewer_keys(tmp_path):
    model = narrowed_model()
    inputs = tiny_inputs(model, 600, padding="left")
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        result = calibrate(model, [inputs])
        assert result.head_budgets == [[3, 2, 0, 0], [0, 0, 0, 0]]
        assert result.keys_per_query < 0.7 * result.full_keys_per_query
        torch.testing.assert_close(model(**inputs).last_hidden_state, expected)
        model.save_pretrained(tmp_path)
        loaded = AdaptiveSparseModel.from_pretrained(tmp_path).eval()
        assert loaded.config.head_budgets == result.head_budgets
        torch.testing.assert_close(loaded(**inputs).last_hidden_state, expected)


def test_a_layer_whose_heads_read_nothing_more_does_not_search(monkeypatch):
    from adaptive_longformer.modeling import adaptive

    model = narrowed_model()
    inputs = tiny_inputs(model, 300)
    calibrate(model, [inputs])
    searches, original = [], adaptive.select_blocks

    def counted(query, key, window, options, **kwargs):
        searches.append(options.num_blocks)
        return original(query, key, window, options, **kwargs)

    monkeypatch.setattr(adaptive, "select_blocks", counted)
    model(**inputs)
    assert searches == [3]


def test_calibration_needs_something_to_measure_on():
    with pytest.raises(ValueError, match="batches is empty"):
        calibrate(tiny_adaptive_model(), [])
    model = tiny_model()
    with pytest.raises(ValueError, match="attention_pattern='adaptive'"):
        calibrate(model, [tiny_inputs(model)])
