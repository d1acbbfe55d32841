"""Parameter groups in which gates, budgets and windows learn faster than weights."""

from typing import Any

from torch import nn


def adaptive_parameter_groups(
    model: nn.Module, learning_rate: float, *, weight_decay: float = 0.0, multiplier: float = 20.0
) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser: matrices, biases and norms, and the adaptive parameters.

    Gates, budgets and windows are numbers around 1 with one gradient per head; at the learning rate
    of a weight they hardly move in a fine-tuning. Weight decay would close them for no reason.

        groups = adaptive_parameter_groups(model, 5e-5, weight_decay=0.01)
        Trainer(..., optimizers=(torch.optim.AdamW(groups), None))

    Args:
        model: a model with attention_pattern "adaptive", as it is or wrapped by PEFT.
        learning_rate: of everything else.
        weight_decay: of matrices; biases, norms and the adaptive parameters have none.
        multiplier: how many times faster the adaptive parameters learn; 10 to 50 are useful.

    Raises:
        ValueError: the multiplier is not above 0, or no adaptive parameter is trainable.
    """
    if not multiplier > 0:
        raise ValueError(f"multiplier is {multiplier}, a number above 0 is needed")
    matrices, others, adaptive = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "adaptive" in name.split("."):
            adaptive.append(parameter)
        elif parameter.ndim >= 2:
            matrices.append(parameter)
        else:
            others.append(parameter)
    if not adaptive:
        raise ValueError(
            "the model has no trainable adaptive parameter: load it with "
            "attention_pattern='adaptive', and give PEFT modules_to_save=['adaptive']"
        )
    return [
        {"params": matrices, "lr": learning_rate, "weight_decay": weight_decay},
        {"params": others, "lr": learning_rate, "weight_decay": 0.0},
        {"params": adaptive, "lr": learning_rate * multiplier, "weight_decay": 0.0},
    ]
