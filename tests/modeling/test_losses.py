import pytest
import torch
from torch.nn import functional as F
from transformers.loss.loss_utils import (
    ForMaskedLMLoss,
    ForQuestionAnsweringLoss,
    ForSequenceClassificationLoss,
)

from adaptive_longformer.modeling.losses import (
    choice_loss,
    classification_loss,
    span_loss,
    token_loss,
)
from adaptive_longformer.testing import tiny_config


def test_token_loss_ignores_minus_100_and_equals_transformers():
    logits, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    labels[0, :3] = -100
    torch.testing.assert_close(token_loss(logits, labels), ForMaskedLMLoss(logits, labels, 7))


def test_token_loss_divides_by_the_items_of_the_whole_accumulated_batch():
    logits, labels = torch.randn(4, 5, 7), torch.randint(0, 7, (4, 5))
    labels[0] = -100  # micro-batches of different weight
    num_items = (labels != -100).sum()
    parts = sum(token_loss(logits[i : i + 2], labels[i : i + 2], num_items) for i in (0, 2))
    torch.testing.assert_close(parts, token_loss(logits, labels))


@pytest.mark.parametrize("problem_type", [None, "explicit"])
@pytest.mark.parametrize(
    ("num_labels", "labels", "kind"),
    [
        (1, torch.rand(4), "regression"),
        (3, torch.rand(4, 3), "regression"),
        (3, torch.tensor([0, 2, 1, 1]), "single_label_classification"),
        (3, torch.tensor([0, 2, 1, 1], dtype=torch.int32), "single_label_classification"),
        (3, torch.eye(4, 3), "multi_label_classification"),
    ],
)
def test_classification_loss_equals_transformers(num_labels, labels, kind, problem_type):
    problem_type = kind if problem_type else None
    logits = torch.randn(4, num_labels)
    config = tiny_config(num_labels=num_labels, problem_type=problem_type)
    expected = ForSequenceClassificationLoss(
        labels.to(torch.int64) if labels.dtype == torch.int32 else labels, logits, config
    )
    torch.testing.assert_close(classification_loss(logits, labels, problem_type), expected)


def test_regression_with_one_sequence_has_no_shape_trap():
    torch.testing.assert_close(
        classification_loss(torch.tensor([[2.0]]), torch.tensor([5.0]), None), torch.tensor(9.0)
    )


def test_span_loss_ignores_positions_beyond_the_input_and_equals_transformers():
    start, end = torch.randn(3, 6), torch.randn(3, 6)
    starts, ends = torch.tensor([0, 5, 99]), torch.tensor([2, -4, 5])
    expected = ForQuestionAnsweringLoss(start, end, starts, ends)
    logits = torch.stack([start, end], dim=2)
    for positions in ((starts, ends), (starts[:, None], ends[:, None])):
        torch.testing.assert_close(span_loss(logits, *positions), expected)


def test_choice_loss_is_not_shifted():
    logits, labels = torch.randn(3, 4), torch.tensor([0, 3, 2])
    torch.testing.assert_close(choice_loss(logits, labels), F.cross_entropy(logits, labels))


def test_losses_of_half_precision_are_computed_in_full_precision():
    logits = torch.randn(4, 3).bfloat16()
    loss = classification_loss(logits, torch.tensor([0, 1, 2, 0]), None)
    assert loss.dtype == torch.float32
