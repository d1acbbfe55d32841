"""The losses of the task heads, equal to those of Transformers' BERT-like models."""

import torch
from torch.nn import functional as F


def token_loss(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Cross entropy over tokens; the label -100 is ignored.

    Args:
        logits: [batch, length, classes].
        labels: [batch, length].
        num_items_in_batch: what to divide the sum by, which Trainer passes so that gradient
            accumulation weighs every token alike; None: the number of labels that are not ignored.
    """
    labels = labels.to(logits.device).flatten()
    logits = _full_precision(logits).flatten(0, 1)
    if num_items_in_batch is None:
        return F.cross_entropy(logits, labels)
    return F.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch


def next_token_loss(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """`token_loss` of every token's prediction of the next one; labels are those of the tokens."""
    return token_loss(logits[:, :-1], labels[:, 1:], num_items_in_batch)


def classification_loss(
    logits: torch.Tensor, labels: torch.Tensor, problem_type: str | None
) -> torch.Tensor:
    """Mean squared error, cross entropy or binary cross entropy over whole sequences.

    Args:
        logits: [batch, num_labels].
        labels: [batch] class numbers or regression targets, or [batch, num_labels].
        problem_type: "regression", "single_label_classification", "multi_label_classification", or
            None: regression for one label, single-label for whole numbers, multi-label otherwise.
    """
    num_labels = logits.shape[-1]
    logits, labels = _full_precision(logits), labels.to(logits.device)
    if problem_type is None:
        if num_labels == 1:
            problem_type = "regression"
        elif labels.dtype in (torch.int64, torch.int32):
            problem_type = "single_label_classification"
        else:
            problem_type = "multi_label_classification"
    if problem_type == "regression":
        return F.mse_loss(logits.view(labels.shape), labels.to(logits.dtype))
    if problem_type == "single_label_classification":
        return F.cross_entropy(logits, labels.flatten().long())
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


def choice_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy over the choices: logits [batch, num_choices], labels [batch]."""
    return F.cross_entropy(_full_precision(logits), labels.to(logits.device))


def span_loss(
    logits: torch.Tensor, start_positions: torch.Tensor, end_positions: torch.Tensor
) -> torch.Tensor:
    """Mean cross entropy of an answer's start and end; positions beyond the input are ignored.

    Args:
        logits: [batch, length, 2].
        start_positions, end_positions: [batch] or [batch, 1].
    """
    length = logits.shape[1]
    losses = [
        F.cross_entropy(
            scores, positions.to(logits.device).view(-1).clamp(0, length), ignore_index=length
        )
        for scores, positions in zip(
            _full_precision(logits).unbind(2), (start_positions, end_positions), strict=True
        )
    ]
    return (losses[0] + losses[1]) / 2


def _full_precision(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
