"""What training adds to the loss of a task for the sake of the selection."""

import torch
from torch import nn

from adaptive_longformer.modeling.adaptive_selection import selections

# How fast the price of density answers to a density above the target.
PRICE_STEP = 0.01


def density_loss(model: nn.Module, target: float) -> torch.Tensor:
    """What is added to a loss so that training ends at a density of `target`.

    strength * (price + excess) * excess for an excess of density - target, with gradients of the
    last factor only (augmented Lagrangian); 0 below the target, where nothing need be pressed. The
    price rises while the density is above the target and falls, to 0 at the least, below it (dual
    ascent); every call in training mode moves it. The strength lets the task be heard before
    anything is pruned.

    Args:
        model: a model with adaptive layers.
        target: see `AdaptiveSparseConfig.target_density`.
    """
    parts = selections(model)
    density = torch.stack([part.density() for part in parts]).mean()
    excess = density - target
    price = parts[0].price.clone()
    if model.training:
        with torch.no_grad():
            moved = (price + PRICE_STEP * parts[0].strength * excess).clamp(min=0.0)
            for part in parts:
                part.price.copy_(moved)
    return parts[0].strength.clone() * (price + excess.detach()) * excess.clamp(min=0.0)
