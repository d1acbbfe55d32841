"""Writes what the heads have learned to do without into the model, for speed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from adaptive_longformer.analysis.sparsity import sparsity_report
from adaptive_longformer.modeling.adaptive_selection import selections
from adaptive_longformer.modeling.head_budgets import write_selection


@dataclass(frozen=True)
class Calibration:
    """What a model needs after training.

    Attributes:
        head_budgets: for every layer the blocks each head may select.
        head_windows: for every layer the tokens each head sees to either side.
        keys_per_query: keys of nonzero weight that a query reads, mean over the batches.
        full_keys_per_query: the same if every budget and window were as wide as the configuration
            allows.
    """

    head_budgets: list[list[int]]
    head_windows: list[list[int]]
    keys_per_query: float
    full_keys_per_query: float


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Calibration:
    """Fixes what every head reads at most: blocks, to what its budget has left it, and tokens to
    either side, to where its window ends.

    Entries beyond have no weight, so no output changes; a layer then searches for no more blocks
    than its widest head reads, and not at all if no head reads any. The numbers are written into
    the model, to be saved with it or with its adapter, and into `config.head_budgets` and
    `config.head_windows`.

    Args:
        model: a model with attention_pattern "adaptive", trained, as it is or wrapped by PEFT.
        batches: what its forward takes, to measure on; at least one.

    Raises:
        ValueError: there is no batch, or the model has no adaptive layers.
    """
    batches = list(batches)
    if not batches:
        raise ValueError("batches is empty, at least one batch to measure on is needed")
    parts = selections(model)
    after = [sparsity_report(model, batch).keys_per_query for batch in batches]
    learned = [(part.gate.clone(), part.budget.clone(), part.span.clone()) for part in parts]
    try:
        for part in parts:
            for parameter in (part.gate, part.budget, part.span):
                parameter.fill_(1.0)
        full = [sparsity_report(model, batch).keys_per_query for batch in batches]
    finally:
        for part, (gate, budget, span) in zip(parts, learned, strict=True):
            part.gate.copy_(gate)
            part.budget.copy_(budget)
            part.span.copy_(span)
    limits = [part.limits() for part in parts]
    head_budgets, head_windows = [list(of_layers) for of_layers in zip(*limits, strict=True)]
    write_selection(parts, head_budgets=head_budgets, head_windows=head_windows)
    return Calibration(
        head_budgets=head_budgets,
        head_windows=head_windows,
        keys_per_query=sum(after) / len(after),
        full_keys_per_query=sum(full) / len(full),
    )
