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
from adaptive_longformer.modeling.adaptive_selection import selections, set_selection_strength
from adaptive_longformer.training import adaptive_parameter_groups
from quality.tasks import FAR_SHARE, MORE_STEPS, PRETRAINING, make_batch
from quality.variants import BASE, VOCABULARIES, Variant

RAMP_RATIO = 0.25
# Tokens per document of the pretraining. Nothing depends on positions, so that longer ones are read
# just as well.
NEAR_LENGTH = 256
# Evaluation data come from generators that no training uses.
EVALUATION_SEED = 10**6


def new_model(pretraining: str, seed: int, **sizes) -> AdaptiveSparseForTokenClassification:
    torch.manual_seed(seed)
    config = AdaptiveSparseConfig(**{**BASE, **VOCABULARIES[pretraining], **sizes})
    return AdaptiveSparseForTokenClassification(config)


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


def pretrain(
    model,
    pretraining: str,
    folder: Path,
    *,
    steps: int,
    batch_size: int,
    length: int,
    seed: int,
) -> None:
    """Learns one of `PRETRAINING` on short documents, asked about what is near; saves the model."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    model.train()
    steps *= MORE_STEPS[pretraining]
    for step in range(steps):
        _set_learning_rate(optimizer, step, steps)
        for task in PRETRAINING[pretraining]:
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
    """How well documents that no training has seen are answered.

    Returns:
        The share of right answers and the mean bits of surprise per answer, on near and on far
        questions; None where a task has no such questions.
    """
    generator = torch.Generator().manual_seed(EVALUATION_SEED + seed)
    model.eval()
    found = {"near": [], "far": []}
    for _ in range(num_documents):
        batch = make_batch(task, 1, length, held_out=True, generator=generator)
        batch = batch.to(model.device)
        log_odds = model(**batch.inputs).logits.log_softmax(dim=-1)
        for name, where in (("near", batch.is_near), ("far", batch.is_far)):
            labels = batch.labels[where]
            bits = -log_odds[where].gather(-1, labels[:, None])[:, 0] / math.log(2)
            is_right = (log_odds[where].argmax(dim=-1) == labels).float()
            found[name].append(torch.stack([is_right, bits]))
    means = {name: torch.cat(parts, dim=1).mean(dim=1).tolist() for name, parts in found.items()}
    result = {}
    for name, (share, bits) in means.items():
        is_asked = not math.isnan(share)
        result[name] = share if is_asked else None
        result[f"{name}_bits"] = bits if is_asked else None
    return result


def study_inputs(model, task: str, *, length: int, seed: int) -> dict[str, torch.Tensor]:
    """Four documents to look into, all of whose questions are far, if the task has such."""
    generator = torch.Generator().manual_seed(EVALUATION_SEED + seed + 1)
    far_share = 1.0 if FAR_SHARE.get(task) else 0.0
    batch = make_batch(task, 4, length, far_share=far_share, held_out=True, generator=generator)
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
