import pytest
import torch
from torch.nn import functional as F

from adaptive_longformer.training.class_weights import WeightedLoss


def test_every_example_counts_with_the_weight_of_its_class():
    loss = WeightedLoss(["a"] * 6 + ["b"] * 2, ["a", "b"])
    assert loss.weights.tolist() == pytest.approx([8 / 12, 8 / 4])
    logits, labels = torch.randn(5, 2), torch.tensor([0, 1, 0, 0, 1])
    each = F.cross_entropy(logits, labels, reduction="none") * loss.weights[labels]
    torch.testing.assert_close(loss({"logits": logits}, labels), each.mean())
    # The Trainer says how many examples a step has, and adds up the losses of its batches.
    halves = [loss({"logits": logits[rows]}, labels[rows], 5) for rows in ([0, 1], [2, 3, 4])]
    torch.testing.assert_close(halves[0] + halves[1], each.mean())


def test_a_class_without_examples_is_named():
    with pytest.raises(ValueError, match=r"the classes \['c'\] have no weight"):
        WeightedLoss(["a", "b"], ["a", "b", "c"])
