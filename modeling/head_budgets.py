"""How strongly every head reads what it selects, how much of it, and how wide its window is."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from adaptive_longformer.configuration.configuration_adaptive_sparse import AdaptiveSparseConfig
from adaptive_longformer.configuration.configuration_adaptive_sparse_seq2seq import (
    AdaptiveSparseSeq2SeqConfig,
)
from adaptive_longformer.patterns.sliding_window import SlidingWindow
from adaptive_longformer.selection.head_weights import (
    BUDGET_RAMP,
    WINDOW_RAMP,
    HeadNumbers,
    HeadWeights,
    head_weights,
)
from adaptive_longformer.selection.options import SelectionOptions

# How fast the price of density answers to a density above the target.
PRICE_STEP = 0.01
# Fields of the configuration, and the buffers that they are the record of.
RECORDED = {
    "selection_strength": "strength",
    "head_budgets": "head_budgets",
    "head_windows": "head_windows",
}
# Of a head whose budget or window is not calibrated.
NO_LIMIT = 2**31 - 1


class HeadBudgets(nn.Module):
    """The weights of what a layer selects, and its learned windows.

    The j-th best block of head h gets the weight

        strength * gate_h * clamp((budget_h * num_blocks + ramp - j) / ramp, 0, 1)

    as an additive logarithm, and leaves the list where that is 0. gate, budget and span start at 1,
    where nothing is weakened or narrowed. strength is 0 in a converted checkpoint.

    The buffers own strength and head limits: they travel with checkpoints and adapters, and layers
    read nothing else. The configuration is their record, which fresh layers start from; see
    `write_selection` and `match_configuration`, the only two that make them agree.

    Args:
        config: the configuration of the model; of an encoder-decoder, the encoder is meant.
        layer_idx: number of the layer.
        is_causal: whether queries see earlier keys only.

    Attributes:
        window: what is read anyway, under causality without what comes later.
        gate, budget, span: [heads]. The budget is a share of `num_selected_blocks`, the span of the
            window's radius.
        strength: scalar, see `AdaptiveSparseConfig`.
        head_budgets: int64 [heads], blocks a head may choose at most, see `calibrate`; very many
            before that.
        head_windows: int64 [heads], tokens to either side that a head may see at most, see
            `calibrate`; very many before that.
        price: scalar, what a unit of density costs in training; the same in every layer.
    """

    strength: torch.Tensor
    head_budgets: torch.Tensor
    head_windows: torch.Tensor
    price: torch.Tensor

    def __init__(
        self,
        config: AdaptiveSparseConfig | AdaptiveSparseSeq2SeqConfig,
        layer_idx: int,
        is_causal: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = is_causal
        self.options: SelectionOptions = config.selection_options
        if config.selection_sampling:
            self.options = replace(self.options, sampling_seed=layer_idx)
        pattern = config.pattern(layer_idx)
        assert isinstance(pattern, SlidingWindow)
        self.pattern = pattern
        self.window = SlidingWindow(pattern.left, 0) if is_causal else pattern
        heads = config.num_attention_heads
        self.gate = nn.Parameter(torch.ones(heads))
        self.budget = nn.Parameter(torch.ones(heads))
        self.span = nn.Parameter(torch.ones(heads))
        self.register_buffer("strength", torch.zeros(()))
        self.register_buffer("head_budgets", torch.zeros(heads, dtype=torch.int64))
        self.register_buffer("head_windows", torch.zeros(heads, dtype=torch.int64))
        self.register_buffer("price", torch.zeros(()))
        self._known: dict[str, tuple[torch.Tensor, int | None, Any]] = {}
        self._losses: torch.Tensor | None = None

    def reset_parameters(self) -> None:
        """Everything as in a fresh layer, except what a checkpoint brought."""
        for parameter in (self.gate, self.budget, self.span):
            init.ones_(parameter)
        init.zeros_(self.price)
        for field, name in RECORDED.items():
            init.copy_(getattr(self, name), self.recorded(field))

    def recorded(self, field: str) -> torch.Tensor:
        """What the configuration says in a field of `RECORDED` about this layer."""
        value = getattr(self.config, field)
        if field == "selection_strength":
            return torch.tensor(float(value))
        no_limits = [NO_LIMIT] * self.config.num_attention_heads
        return torch.tensor(no_limits if value is None else value[self.layer_idx])

    def train(self, mode: bool = True) -> "HeadBudgets":
        """As in torch; and forgets what was read, as some optimisers write behind torch's back."""
        self._known.clear()
        return super().train(mode)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._known.clear()
        super()._load_from_state_dict(*args, **kwargs)

    @property
    def is_active(self) -> bool:
        """Whether anything is chosen or narrowed at all."""
        return self._on_host("strength", lambda strength: bool(strength > 0), True)

    def most_blocks(self) -> int:
        """How many blocks the head that may choose the most may choose."""
        most = self._on_host("head_budgets", lambda budgets: int(budgets.max()), NO_LIMIT)
        return min(most, self.options.num_blocks)

    def weights(self, has_ranks: bool = True, has_window: bool = True) -> HeadWeights:
        """What all this means for ranks and windows, as far as it is asked; see `head_weights`."""
        numbers = HeadNumbers(
            whole(self.gate), whole(self.budget), whole(self.span),
            self.strength, self.head_budgets, self.head_windows,
        )  # fmt: skip
        num_blocks = self.options.num_blocks if has_ranks else 0
        return head_weights(numbers, num_blocks, self.window.left if has_window else 0)

    @torch.no_grad()
    def limits(self) -> tuple[list[int], list[int]]:
        """How many blocks each head reads, and tokens to either side, with a weight above 0."""
        weights = self.weights()
        assert weights.rank_limit is not None and weights.reach is not None
        return weights.rank_limit.tolist(), weights.reach.tolist()

    def narrows(self) -> bool:
        """Whether a learned window may be narrower than the pattern's."""
        radius = self.window.left
        # Not read in training, where it changes with every step: that would wait for the device.
        return (
            (torch.is_grad_enabled() and self.span.requires_grad)
            or self._on_host("span", lambda span: bool((span < 1).any()), True)
            or self._on_host("head_windows", lambda limit: bool((limit < radius).any()), True)
        )

    def most_keys(self) -> float:
        """How many keys a query in the middle of a long document reads at most, mean over heads,
        without global tokens.
        """
        blocks, reach = self.limits()
        sides = 1 if self.is_causal else 2
        is_open = whole(self.gate) * self.strength > 0
        shared = self.options.num_global_blocks * int(is_open.sum())
        keys = len(reach) + sides * sum(reach) + self.options.block_size * (sum(blocks) + shared)
        return keys / len(reach)

    def density(self) -> torch.Tensor:
        """About the share of the keys of the full budget with a weight above 0, mean over heads.

        1 where all are read, 0 where none is, linear in budgets and windows in between. A gate
        makes a head's blocks weaker, not fewer, unless it closes.
        """
        assert self.window.right is not None
        radius = self.window.left
        window = float(self.window.left + self.window.right)
        blocks = float(self.options.num_blocks * self.options.block_size)
        # Of the blocks at the end of a list, BUDGET_RAMP - 1 have less than their full weight.
        ramp = (BUDGET_RAMP - 1.0) / self.options.num_blocks
        budget, gate, span = whole(self.budget), whole(self.gate), whole(self.span)
        blocks_left = ((budget + ramp) / (1.0 + ramp)).clamp(min=0.0) * (gate > 0)
        ramp = WINDOW_RAMP / radius
        window_left = ((span + ramp) / (1.0 + ramp)).clamp(min=1.0 / (radius + WINDOW_RAMP))
        return ((blocks_left * blocks + window_left * window) / (blocks + window)).mean()

    def record_losses(self, task: torch.Tensor, total: torch.Tensor) -> None:
        """Notes a loss without and with the density's share, for `share_of_task`."""
        if not torch.compiler.is_compiling():
            losses = torch.stack([task.detach(), total.detach()])
            self._losses = losses if self._losses is None else self._losses + losses

    def share_of_task(self) -> float | None:
        """The task's share of the losses since the last call; None if none was noted."""
        losses, self._losses = self._losses, None
        return None if losses is None else float(losses[0] / losses[1])

    def _on_host(self, name: str, read: Callable[[torch.Tensor], Any], safe: Any) -> Any:
        """What follows from one tensor, read from the device again only when that changes.

        While compiling it is what was read last, or `safe`, with which every result is right, if
        slower.
        """
        tensor = getattr(self, name)
        if torch.compiler.is_compiling():
            return self._known[name][2] if name in self._known else safe
        version = None if tensor.is_inference() else tensor._version
        known = self._known.get(name)
        if known is None or version is None or known[0] is not tensor or known[1] != version:
            known = self._known[name] = (tensor, version, read(tensor))
        return known[2]


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """All of a parameter, also outside its layer, where FSDP leaves each process a part of it.

    Raises:
        RuntimeError: DeepSpeed's ZeRO-3 has taken it away.
    """
    if parameter.numel() == 0:
        raise RuntimeError(
            "outside its layer an adaptive parameter has no elements under ZeRO-3: train with "
            "target_density under ZeRO-2, FSDP2 or DDP"
        )
    gather = getattr(parameter, "full_tensor", None)
    return parameter if gather is None else gather()


def density_loss(parts: Sequence[HeadBudgets], target: float) -> torch.Tensor:
    """What is added to a loss so that training ends at a density of `target`.

    strength * (price + excess) * excess for an excess of density - target, with gradients of the
    last factor only (augmented Lagrangian); 0 below the target, where nothing need be pressed. The
    price rises while the density is above the target and falls, to 0 at the least, below it (dual
    ascent); every call in training mode moves it. The strength lets the task be heard before
    anything is pruned.

    Args:
        parts: the adaptive parts of a model.
        target: see `AdaptiveSparseConfig.target_density`.
    """
    density = torch.stack([part.density() for part in parts]).mean()
    excess = density - target
    price = parts[0].price.clone()
    if parts[0].training:
        with torch.no_grad():
            moved = (price + PRICE_STEP * parts[0].strength * excess).clamp(min=0.0)
            for part in parts:
                part.price.copy_(moved)
    return parts[0].strength.clone() * (price + excess.detach()) * excess.clamp(min=0.0)


@torch.no_grad()
def write_selection(parts: Sequence[HeadBudgets], **values: Any) -> None:
    """Writes fields of `RECORDED` into the configuration and into the buffers of all layers."""
    for part in parts:
        part._known.clear()  # what is compiled reads only what is known
        for field, value in values.items():
            setattr(part.config, field, value)
            buffer = getattr(part, RECORDED[field])
            if isinstance(value, float):
                buffer.fill_(value)  # waits for no device
            else:
                buffer.copy_(part.recorded(field))


def match_configuration(parts: Sequence[HeadBudgets], saved: dict[str, Any]) -> None:
    """Makes the layers of a loaded model and its configuration agree.

    A value that the caller changed in the configuration wins, otherwise the buffers do, and the
    strength is recorded again. (Head limits are recorded where they are written.)

    Args:
        parts: the adaptive parts of the model.
        saved: the configuration beside the weights, where fields may be missing.
    """
    if not parts:
        return
    config = parts[0].config
    now = {field: getattr(config, field) for field in RECORDED}
    changed = {
        field: value
        for field, value in now.items()
        if value != saved.get(field, getattr(type(config), field))
    }
    write_selection(parts, **changed)
    strength = parts[0].strength
    if strength != parts[0].recorded("selection_strength").to(strength):  # whose type may round
        config.selection_strength = strength.item()
