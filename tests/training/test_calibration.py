import pytest
import torch

from adaptive_longformer.configuration.configuration_adaptive_sparse import AdaptiveSparseConfig
from adaptive_longformer.modeling.adaptive_selection import AdaptiveSelection, selections
from adaptive_longformer.modeling.head_budgets import NO_LIMIT
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
    from adaptive_longformer.modeling import adaptive_selection as adaptive

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


@pytest.mark.parametrize("backend", ["reference", "blocked", "auto"])
def test_calibrated_windows_change_no_output(backend, tmp_path, monkeypatch):
    model = tiny_adaptive_model(attention_window=128)
    model.config.attention_backend = backend
    first, second = selections(model)
    with torch.no_grad():
        first.span.copy_(torch.tensor([1.0, 0.5, 0.25, 0.0]))  # of 64 tokens, and 32 to fade out
        second.span.fill_(0.1)
        second.budget.fill_(-0.6)  # reads nothing but its window
        inputs = tiny_inputs(model, 400, padding="left")
        expected = model(**inputs).last_hidden_state
        result = calibrate(model, [inputs])
        assert result.head_windows == [[64, 63, 47, 31], [38, 38, 38, 38]]
        assert model.config.head_windows == result.head_windows
        assert torch.equal(model(**inputs).last_hidden_state, expected)
        model.save_pretrained(tmp_path)
        loaded = AdaptiveSparseModel.from_pretrained(tmp_path).eval()
        assert loaded.config.head_windows == result.head_windows
        assert [part.head_windows.tolist() for part in selections(loaded)] == result.head_windows
        assert torch.equal(loaded(**inputs).last_hidden_state, expected)
        # With every block of the whole window in the lists.
        weights, whole = AdaptiveSelection.weights, torch.full((4,), 64)
        monkeypatch.setattr(
            AdaptiveSelection, "weights", lambda *given: weights(*given)._replace(reach=whole)
        )
        unpruned = model(**inputs).last_hidden_state
        torch.testing.assert_close(unpruned, expected, atol=1e-6, rtol=1e-6)


def test_what_is_calibrated_stays_closed_when_training_goes_on():
    model = tiny_adaptive_model(attention_window=128)
    with torch.no_grad():
        for part in selections(model):
            part.budget.fill_(0.0)
            part.span.fill_(0.1)
        calibrate(model, [tiny_inputs(model, 300)])
        for part in selections(model):
            part.budget.fill_(1.0)
            part.span.fill_(1.0)
            assert part.limits()[0] == [1] * 4
            assert part.limits()[1] == [38] * 4


def test_limits_that_the_caller_changes_win_over_those_of_the_checkpoint(tmp_path):
    model = narrowed_model()
    calibrate(model, [tiny_inputs(model, 300)])
    model.save_pretrained(tmp_path)
    config = AdaptiveSparseConfig.from_pretrained(tmp_path)
    config.head_budgets, config.head_windows = None, [[5, 6, 7, 8]] * 2
    loaded = AdaptiveSparseModel.from_pretrained(tmp_path, config=config)
    for part in selections(loaded):
        part.span.data.fill_(1.0)  # wide, so that the limit says where a window ends
        assert part.head_budgets.tolist() == [NO_LIMIT] * 4
        assert part.head_windows.tolist() == part.limits()[1] == [5, 6, 7, 8]
