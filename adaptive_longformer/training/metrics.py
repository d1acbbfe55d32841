"""Metrics of classification, computed with scikit-learn: nothing is downloaded."""

from typing import Any

import numpy as np
from transformers import EvalPrediction


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy, balanced accuracy and macro F1 of predicted classes; made for
    `Trainer(compute_metrics=...)`.

    Balanced accuracy is the mean recall of the classes that occur in the labels, so that chance is
    one over their number. A label of -100 is left out.

    Args:
        prediction: logits [..., num_labels] (or a tuple that starts with them) and labels [...].

    Raises:
        ValueError: there is no labelled example.
    """
    # Imported here: the rest of the package does without it.
    from sklearn.metrics import accuracy_score, f1_score, recall_score

    logits, labels = _arrays(prediction)
    labels = labels.reshape(-1)
    predicted = logits.argmax(axis=-1).reshape(-1)
    labelled = labels != -100
    labels, predicted = labels[labelled], predicted[labelled]
    if not labels.size:
        raise ValueError("prediction holds no label, at least one other than -100 is needed")
    # Scikit-learn's types allow only text for zero_division, its documentation 0 and 1 as well.
    options: dict[str, Any] = {"labels": np.unique(labels), "average": "macro", "zero_division": 0}
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "balanced_accuracy": float(recall_score(labels, predicted, **options)),
        "macro_f1": float(f1_score(labels, predicted, **options)),
    }


def multi_label_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """F1 over all labels (micro) and its mean over the classes (macro), and the share of examples
    of which every label is right. A class is predicted where its logit is above 0.

    Args:
        prediction: logits [batch, num_labels] and labels of the same shape, 0 or 1.
    """
    from sklearn.metrics import f1_score

    logits, labels = _arrays(prediction)
    predicted, wanted = logits > 0, labels > 0.5
    options: dict[str, Any] = {"zero_division": 0}
    return {
        "micro_f1": float(f1_score(wanted, predicted, average="micro", **options)),
        "macro_f1": float(f1_score(wanted, predicted, average="macro", **options)),
        "exact_match": float((predicted == wanted).all(axis=-1).mean()),
    }


def regression_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Mean absolute and root mean squared error.

    Args:
        prediction: logits [batch, 1] and labels [batch].
    """
    logits, labels = _arrays(prediction)
    error = logits.reshape(-1) - labels.reshape(-1)
    return {
        "mean_absolute_error": float(np.abs(error).mean()),
        "root_mean_squared_error": float(np.sqrt(np.square(error).mean())),
    }


def _arrays(prediction: EvalPrediction) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels, without what else a model returns."""
    logits, labels = prediction.predictions, prediction.label_ids
    return (
        np.asarray(logits[0] if isinstance(logits, tuple) else logits),
        np.asarray(labels[0] if isinstance(labels, tuple) else labels),
    )


# By the problem type of Transformers' configurations.
METRICS = {
    "single_label_classification": classification_metrics,
    "multi_label_classification": multi_label_metrics,
    "regression": regression_metrics,
}
