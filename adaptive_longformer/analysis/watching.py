"""Runs a model and shows what each adaptive layer was given and what it reads."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from adaptive_longformer.modeling.adaptive_selection import AdaptiveSelection, Reads, selections

See = Callable[[int, AdaptiveSelection, tuple, Reads], None]


@torch.no_grad()
def watch(model: nn.Module, batch: Mapping[str, Any], see: See) -> None:
    """Runs a model in evaluation mode.

    Args:
        model: a model with attention_pattern "adaptive", as it is or wrapped by PEFT.
        batch: what its forward takes.
        see: called by every adaptive layer with its number, its adaptive part, the arguments of
            `AdaptiveSelection.forward`, and what the layer reads.

    Raises:
        ValueError: the model has no adaptive layers.
    """
    parts = selections(model)
    if not parts:
        raise ValueError(
            "the model selects nothing: load it with attention_pattern='adaptive' to see what it "
            "reads"
        )

    def hook_of(number: int, part: AdaptiveSelection):
        def hook(module, args, output) -> None:
            see(number, part, args, output[1])

        return hook

    handles = [
        part.register_forward_hook(hook_of(number, part)) for number, part in enumerate(parts)
    ]
    was_training = model.training
    try:
        model.eval()(**batch)
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
