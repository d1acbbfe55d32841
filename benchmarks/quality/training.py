"""Trains and measures one model."""

import math
from pathlib import Path

import torch

from adaptive_longformer import AdaptiveSparseConfig, AdaptiveSparseForTokenClassification
from adaptive_longformer.analysis.sparsity import SparsityReport, sparsity_report
from adaptive_longformer.configuration.configuration_adaptive_sparse import (
    BASELINE_PATTERNS,
    SELECTING_PATTERNS,
)
from adaptive_longformer.modeling.adaptive import selections, set_selection_strength
from adaptive_longformer.training import adaptive_parameter_groups
from quality.tasks import FAR_SHARE, PRETRAINING_TASKS, make_batch
from quality.variants import BASE, Variant

RAMP_RATIO = 0.25
# Tokens per document of the pretraining. Nothing depends on positions, so that longer ones are read
# just as well.
NEAR_LENGTH = 256
# Evaluation data come from generators that no training uses.
EVALUATION_SEED = 10**6


def new_model(seed: int, **overrides) -> AdaptiveSparseForTokenClassification:
    torch.manual_seed(seed)
    return AdaptiveSparseForTokenClassification(AdaptiveSparseConfig(**{**BASE, **overrides}))


def load_variant(folder: Path, variant: Variant, **overrides):
    """The pretrained model with a variant's attention; what it selects is read at full strength."""
    model = AdaptiveSparseForTokenClassification.from_pretrained(
        folder, **variant.config, **overrides
    )
    for part in selections(model):
        if variant.zero_gate:
            torch.nn.init.zeros_(part.gate)
    if selects(model):
        set_selection_strength(model, 1.0)
    return model


def selects(model) -> bool:
    return model.config.attention_pattern in SELECTING_PATTERNS


def pretrain(model, folder: Path, *, steps: int, batch_size: int, length: int, seed: int) -> None:
    """Learns both tasks on short documents, where everything is near; saves the model."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    model.train()
    for step in range(steps):
        _set_learning_rate(optimizer, step, steps)
        for task in PRETRAINING_TASKS:
            batch = make_batch(
                task,
                batch_size * length // NEAR_LENGTH,
                NEAR_LENGTH,
                far_share=0.0,
                generator=generator,
            ).to(model.device)
            model(**batch.inputs, labels=batch.labels).loss.backward()
        _step(model, optimizer)
    model.save_pretrained(folder)


def finetune(
    model, task: str, *, steps: int, batch_size: int, length: int, seed: int, ramp: bool = True
) -> None:
    """Trains on documents of a task."""
    generator = torch.Generator().manual_seed(seed)
    groups = model.parameters()
    if selects(model):
        groups = adaptive_parameter_groups(model, 1e-3)
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.0)
    model.train()
    ramp_steps = max(1, math.ceil(RAMP_RATIO * steps)) if ramp else 1
    for step in range(steps):
        if selects(model):
            set_selection_strength(model, min(1.0, (step + 1) / ramp_steps))
        _set_learning_rate(optimizer, step, steps)
        batch = make_batch(task, batch_size, length, generator=generator)
        batch = batch.to(model.device)
        model(**batch.inputs, labels=batch.labels).loss.backward()
        _step(model, optimizer)


def _set_learning_rate(optimizer, step: int, steps: int) -> None:
    """Rises over 5 % of the steps, then falls linearly to 0."""
    factor = min(1.0, (step + 1) / (0.05 * steps), (steps - step) / steps)
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("highest_lr", group["lr"]) * factor


def _step(model, optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def accuracy(
    model, task: str, *, num_documents: int, length: int, seed: int
) -> dict[str, float | None]:
    """Accuracy on near and on far questions of documents that no training has seen; None where a
    task has no such questions.
    """
    generator = torch.Generator().manual_seed(EVALUATION_SEED + seed)
    model.eval()
    right, asked = {"near": 0, "far": 0}, {"near": 0, "far": 0}
    for _ in range(num_documents):
        batch = make_batch(task, 1, length, generator=generator)
        batch = batch.to(model.device)
        answers = model(**batch.inputs).logits.argmax(dim=-1)
        for name, where in (("near", ~batch.is_far), ("far", batch.is_far)):
            where = where & (batch.labels >= 0)
            right[name] += int((answers == batch.labels)[where].sum())
            asked[name] += int(where.sum())
    return {name: right[name] / asked[name] if asked[name] else None for name in right}


def study_inputs(model, task: str, *, length: int, seed: int) -> dict[str, torch.Tensor]:
    """Four documents to look into, all of whose questions are far, if the task has such."""
    generator = torch.Generator().manual_seed(EVALUATION_SEED + seed + 1)
    far_share = 1.0 if FAR_SHARE[task] else 0.0
    batch = make_batch(task, 4, length, far_share=far_share, generator=generator)
    return batch.to(model.device).inputs


def report_of(model, task: str, *, length: int, seed: int) -> SparsityReport:
    """What a trained model that selects reads."""
    model.eval()
    return sparsity_report(model, study_inputs(model, task, length=length, seed=seed))


@torch.no_grad()
def keys_per_query(model, task: str, *, length: int, seed: int) -> float | None:
    """Keys that an ordinary token reads by a fixed pattern, mean over layers; None for attention
    without such a number. Of what selects, `report_of` tells.
    """
    if model.config.attention_pattern in BASELINE_PATTERNS:
        return None
    # Fresh weights: no probability is so small that it becomes 0.
    fresh = AdaptiveSparseForTokenClassification(model.config).eval().to(model.device)
    inputs = study_inputs(model, task, length=length, seed=seed)
    attentions = fresh(**{k: v[:1] for k, v in inputs.items()}, output_attentions=True).attentions
    return sum(float((layer[0, :, 1:] > 0).sum(-1).float().mean()) for layer in attentions) / len(
        attentions
    )
