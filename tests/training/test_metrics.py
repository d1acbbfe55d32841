import numpy as np
import pytest
from transformers import EvalPrediction

from adaptive_longformer.training.metrics import (
    classification_metrics,
    multi_label_metrics,
    regression_metrics,
)


def test_metrics_of_a_case_computed_by_hand():
    logits = np.array([[2.0, 1.0], [2.0, 1.0], [2.0, 1.0], [0.0, 1.0]])
    metrics = classification_metrics(EvalPrediction(logits, np.array([0, 0, 0, 1])))
    assert metrics == {"accuracy": 1.0, "balanced_accuracy": 1.0, "macro_f1": 1.0}
    metrics = classification_metrics(EvalPrediction(logits, np.array([0, 0, 1, 1])))
    assert metrics["accuracy"] == 0.75
    assert metrics["balanced_accuracy"] == 0.75
    assert metrics["macro_f1"] == pytest.approx((4 / 5 + 2 / 3) / 2)


def test_answering_the_larger_class_has_the_balanced_accuracy_of_chance():
    prediction = EvalPrediction(np.tile([[1.0, 0.0]], (10, 1)), np.array([0] * 9 + [1]))
    metrics = classification_metrics(prediction)
    assert metrics["accuracy"] == 0.9
    assert metrics["balanced_accuracy"] == 0.5


def test_a_class_that_is_only_predicted_does_not_count():
    metrics = classification_metrics(EvalPrediction(np.eye(3)[[0, 2]], np.array([0, 1])))
    assert metrics["balanced_accuracy"] == 0.5


def test_ignored_labels_and_extra_outputs_are_left_out():
    logits = np.array([[[0.0, 1.0], [1.0, 0.0]]])
    prediction = EvalPrediction((logits, np.zeros(3)), np.array([[1, -100]]))
    assert classification_metrics(prediction)["accuracy"] == 1.0
    with pytest.raises(ValueError, match="holds no label"):
        classification_metrics(EvalPrediction(logits, np.array([[-100, -100]])))


def test_metrics_of_several_labels_and_of_numbers_computed_by_hand():
    logits = np.array([[2.0, -1.0], [1.0, 1.0], [-1.0, -1.0]])
    found = multi_label_metrics(EvalPrediction(logits, np.array([[1.0, 0], [1.0, 0], [0, 1.0]])))
    # Class 0 is right twice; class 1 is named once too often and missed once.
    assert found == pytest.approx({"micro_f1": 4 / 6, "macro_f1": 0.5, "exact_match": 1 / 3})
    numbers = EvalPrediction((np.array([[1.0], [4.0]]), np.zeros(2)), np.array([2.0, 2.0]))
    assert regression_metrics(numbers) == pytest.approx(
        {"mean_absolute_error": 1.5, "root_mean_squared_error": 2.5**0.5}
    )
