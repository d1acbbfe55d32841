"""A loss in which rare classes count as much as frequent ones."""

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch.nn import functional as F


class WeightedLoss:
    """Cross entropy times the weight of the right class; made for `Trainer(compute_loss_func=...)`.

    The weights are those of scikit-learn's "balanced": the number of examples over the number of
    classes and of the class's examples.

    Args:
        labels: of the training.
        classes: in the order of the model's.

    Raises:
        ValueError: a class does not occur.
    """

    def __init__(self, labels: Sequence[Hashable], classes: Sequence[Hashable]) -> None:
        counts = Counter(labels)
        missing = [name for name in classes if not counts[name]]
        if missing:
            raise ValueError(f"the classes {missing} have no weight: they do not occur")
        weights = [len(labels) / (len(classes) * counts[name]) for name in classes]
        self.weights = torch.tensor(weights)

    def __call__(
        self,
        outputs: Any,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The mean over the examples, of all batches of a step if their number is given."""
        logits = outputs["logits"].float()
        labels = labels.flatten()
        total = F.cross_entropy(
            logits, labels, weight=self.weights.to(logits.device), reduction="sum"
        )
        return total / (labels.numel() if num_items_in_batch is None else num_items_in_batch)
