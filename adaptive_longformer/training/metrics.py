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

    logits = prediction.predictions
    logits = np.asarray(logits[0] if isinstance(logits, tuple) else logits)
    labels = prediction.label_ids
    labels = np.asarray(labels[0] if isinstance(labels, tuple) else labels).reshape(-1)
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
