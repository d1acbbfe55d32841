"""What a layer reads besides its window and the global tokens, and how strongly."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import initialization as init

from adaptive_longformer.attention.call import AttentionSpan
from adaptive_longformer.attention.join_gradients import JoinGradients
from adaptive_longformer.attention.padding import ordinary_tokens
from adaptive_longformer.baselines.oracle_selection import oracle_selection
from adaptive_longformer.baselines.random_selection import random_selection
from adaptive_longformer.configuration.configuration_adaptive_sparse import AdaptiveSparseConfig
from adaptive_longformer.configuration.configuration_adaptive_sparse_seq2seq import (
    AdaptiveSparseSeq2SeqConfig,
)
from adaptive_longformer.patterns.block_layout import BlockLayout, window_layout
from adaptive_longformer.patterns.pattern import Pattern
from adaptive_longformer.patterns.sliding_window import SlidingWindow
from adaptive_longformer.selection.lists import selection_layout
from adaptive_longformer.selection.options import SelectionOptions
from adaptive_longformer.selection.residual import ResidualScores, residual_scores
from adaptive_longformer.selection.select_blocks import SelectedBlocks, select_blocks

MIN_WEIGHT = 1e-6
# Over how many ranks a budget fades out, and over how many tokens a window does.
BUDGET_RAMP = 2.0
WINDOW_RAMP = 32.0
# Buffers that the configuration mirrors, by the name of its field.
SELECTION_BUFFERS = {"selection_strength": "strength"}
HEAD_LIMITS = ("head_budgets", "head_windows")
# Of a head whose budget or window is not calibrated.
NO_LIMIT = 2**31 - 1


class Reads(NamedTuple):
    """What a layer reads, as `sparse_attention` takes it."""

    pattern_or_layout: Pattern | BlockLayout
    entry_bias: torch.Tensor | None = None
    span: AttentionSpan | None = None


class SelectionState:
    """One forward pass of one layer; the same object comes back when a checkpointed layer is
    recomputed, and with it the choice that was made.

    Attributes:
        validate: whether to raise on values that are not finite.
        selected: what was chosen, once it was.
    """

    def __init__(self, validate: bool = False) -> None:
        self.validate = validate
        self.selected: SelectedBlocks | None = None


class AdaptiveSelection(nn.Module):
    """Chooses blocks of keys for every block of queries, and weighs them.

    The j-th best block of head h gets the weight

        strength * gate_h * clamp((budget_h * num_blocks + ramp - j) / ramp, 0, 1)

    as an additive logarithm, and leaves the list where that is 0. Blocks that a learned direction
    chooses for the whole document get strength * gate_h * exp(direction . mean key). A learned
    window per head, `AttentionSpan`, narrows what the pattern's window reads. Residual scores
    correct weights and ranks, see `selection.residual`.

    gate, budget and span start at 1, where nothing is weakened or narrowed. strength is 0 in a
    converted checkpoint: then nothing is computed here. All of it is saved, the buffers too, so
    that PEFT's `modules_to_save=["adaptive"]` stores what a task has learned.

    Args:
        config: the configuration of the model; of an encoder-decoder, the encoder is meant.
        layer_idx: number of the layer.
        is_causal: whether queries see earlier keys only. A block of queries is then chosen for by
            the queries of the block before.

    Attributes:
        window: what is read anyway, under causality without what comes later.
        gate, budget, span: [heads]. The budget is a share of `num_selected_blocks`, the span of the
            window's radius.
        global_direction: [heads, head_dim], if `num_learned_global_blocks` is not 0.
        residual_query, residual_key: [heads, residual_rank, head_dim], if `residual_rank` is not 0.
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
    residual_query: nn.Parameter | None
    residual_key: nn.Parameter | None

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
        pattern = config.pattern(layer_idx)
        assert isinstance(pattern, SlidingWindow)
        self.pattern = pattern
        self.window = SlidingWindow(pattern.left, 0) if is_causal else pattern
        heads = config.num_attention_heads
        self.gate = nn.Parameter(torch.ones(heads))
        self.budget = nn.Parameter(torch.ones(heads))
        self.span = nn.Parameter(torch.ones(heads))
        if config.num_learned_global_blocks:
            self.global_direction = nn.Parameter(torch.zeros(heads, config.hidden_size // heads))
        else:
            self.register_parameter("global_direction", None)
        self.residual_query = self.residual_key = None
        if config.residual_rank:
            shape = (heads, config.residual_rank, config.hidden_size // heads)
            self.residual_query = nn.Parameter(torch.zeros(shape))
            self.residual_key = nn.Parameter(torch.zeros(shape))
        self.register_buffer("strength", torch.zeros(()))
        self.register_buffer("head_budgets", torch.zeros(heads, dtype=torch.int64))
        self.register_buffer("head_windows", torch.zeros(heads, dtype=torch.int64))
        self.register_buffer("price", torch.zeros(()))
        self._known: dict[str, tuple[torch.Tensor, int | None, Any]] = {}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Everything as in a fresh layer, except what a checkpoint brought."""
        for parameter in (self.gate, self.budget, self.span):
            init.ones_(parameter)
        if self.global_direction is not None:
            init.zeros_(self.global_direction)
        if self.residual_query is not None and self.residual_key is not None:
            # One factor at 0 makes every score 0, and leaves the other one a gradient.
            init.normal_(self.residual_query, std=self.residual_query.shape[-1] ** -0.5)
            init.zeros_(self.residual_key)
        init.constant_(self.strength, float(self.config.selection_strength))
        init.zeros_(self.price)
        for name in HEAD_LIMITS:
            init.copy_(getattr(self, name), self.configured_limit(name))

    def configured_limit(self, name: str) -> torch.Tensor:
        """What the configuration says in one of `HEAD_LIMITS` about this layer: int64 [heads]."""
        limits = getattr(self.config, name)
        no_limits = [NO_LIMIT] * self.config.num_attention_heads
        return torch.tensor(no_limits if limits is None else limits[self.layer_idx])

    def train(self, mode: bool = True) -> "AdaptiveSelection":
        """As in torch; and forgets what was read, as some optimisers write behind torch's back."""
        self._known.clear()
        return super().train(mode)

    def set_strength(self, strength: float) -> None:
        """See `set_selection_strength`."""
        self._known.clear()  # what is compiled reads only what is known
        self.strength.fill_(strength)
        self.config.selection_strength = float(strength)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._known.clear()
        super()._load_from_state_dict(*args, **kwargs)

    @property
    def is_active(self) -> bool:
        """Whether anything is chosen or narrowed at all."""
        return self._read("strength", lambda strength: bool(strength > 0), True)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        global_mask: torch.Tensor | None = None,
        state: SelectionState | None = None,
    ) -> tuple[torch.Tensor, Reads]:
        """Says what the layer reads.

        Args:
            query, key: [batch, heads, length, head_dim]; blocks start at slot 0, where each row's
                first valid token should be.
            attention_mask: bool [batch, length], True where a token is not padding; None: all are.
            global_mask: bool [batch, length], True where a token is global; None: none is.
            state: of this forward pass; None: nothing is remembered.

        Returns:
            The query, through which every trainable parameter of this module gets a gradient, zeros
            if it took no part; and what the layer reads.
        """
        if torch.is_grad_enabled():
            query = JoinGradients.apply(query, *self.parameters())  # type: ignore[assignment]
        if not self.is_active:
            return query, Reads(self.pattern)
        span = self.attention_span()
        reach = None if span is None else self.window_limit()
        length = query.shape[2]
        options = self._selection_options()
        # Where the window reaches everywhere there is nothing to choose.
        if options is None or length <= self.window.left + 1:
            if reach is None:
                return query, Reads(self.pattern)
            # In the blocks of the selection: calibration then changes no sum's order.
            narrow = window_layout(
                self.window,
                length,
                reach,
                query_block_size=self.options.query_block_size,
                key_block_size=self.options.block_size,
            )
            return query, Reads(narrow, span=span)
        residual = self._residual_scores(query, key, attention_mask, global_mask)
        selected = None if state is None else state.selected
        if selected is None:
            selected = self._select(
                query.detach(),
                key.detach(),
                attention_mask,
                global_mask,
                options,
                None if residual is None else residual.detach(),
                validate=state is not None and state.validate,
            )
            if state is not None:
                state.selected = selected
        is_open = ((self.gate > 0) & (self.strength > 0))[:, None, None]
        read = selected._replace(global_open=selected.global_open & is_open)
        layout, slots = selection_layout(
            read, self.window, length, options, self.rank_limit(), reach
        )
        return query, Reads(layout, self._entry_bias(selected, slots, residual), span)

    def choose_next(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        attention_mask: torch.Tensor | None,
        global_mask: torch.Tensor | None,
        validate: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What one block of queries reads in cached decoding, best first.

        Builds the pyramid of all keys anew: O(length) operations, once per block of queries.

        Args:
            query: [batch, heads, query_block_size + 1, head_dim], those of the block before, and
                the first of the block.
            key: [batch, heads, length, head_dim], up to the first token of the block.
            attention_mask, global_mask: bool [batch, length] as in `forward`.
            validate: whether to raise on values that are not finite.

        Returns:
            Key blocks, int32 [batch, heads, at most num_selected_blocks], and how many of them
            count, int32 [batch, heads].
        """
        options = self._selection_options()
        if options is None:
            nothing = query.new_zeros(query.shape[:2], dtype=torch.int32)
            return nothing[..., None], nothing
        selected = self._select(
            query, key, attention_mask, global_mask, options, None, validate=validate
        )
        return selected.key_blocks[:, :, -1], selected.counts[:, :, -1]

    def _selection_options(self) -> SelectionOptions | None:
        """The options, with no more blocks than the widest head may read; None: none are read."""
        num_blocks = self._read("head_budgets", lambda budgets: int(budgets.max()), NO_LIMIT)
        num_blocks = min(num_blocks, self.options.num_blocks)
        if num_blocks == 0 and self.options.num_global_blocks == 0:
            return None
        return replace(self.options, num_blocks=max(num_blocks, 1))

    def _select(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        attention_mask: torch.Tensor | None,
        global_mask: torch.Tensor | None,
        options: SelectionOptions,
        residual: ResidualScores | None,
        *,
        validate: bool,
    ) -> SelectedBlocks:
        """The choice, or that of one of the controls it is compared with."""
        if self.config.attention_pattern == "random_selection":
            return random_selection(
                query,
                self.window,
                options,
                attention_mask=attention_mask,
                global_mask=global_mask,
                seed=self.layer_idx,
            )
        if self.config.attention_pattern == "oracle":
            return oracle_selection(
                query,
                key,
                self.window,
                options,
                attention_mask=attention_mask,
                global_mask=global_mask,
            )
        return select_blocks(
            query,
            key,
            self.window,
            options,
            attention_mask=attention_mask,
            global_mask=global_mask,
            max_global_tokens=self.config.max_global_tokens,
            is_causal=self.is_causal,
            global_directions=self.global_direction,
            residual=residual,
            validate=validate,
        )

    def _residual_scores(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        attention_mask: torch.Tensor | None,
        global_mask: torch.Tensor | None,
    ) -> ResidualScores | None:
        if self.residual_query is None or self.residual_key is None:
            return None
        return residual_scores(
            query,
            key,
            self.residual_query,
            self.residual_key,
            query_block_size=self.options.query_block_size,
            block_size=self.options.block_size,
            members=ordinary_tokens(attention_mask, global_mask),
        )

    def rank_limit(self) -> torch.Tensor:
        """How many blocks of each head have a weight above 0: int64 [heads]."""
        with torch.no_grad():
            limit = (self._rank_weight(self.options.num_blocks) > 0).sum(dim=-1)
            limit = torch.minimum(limit, self.head_budgets)
            return limit * (self.gate > 0) * (self.strength > 0)

    def window_limit(self) -> torch.Tensor:
        """How many tokens each head sees to either side with a weight above 0: int64 [heads]."""
        with torch.no_grad():
            reach = _precise(self._span_length()) + WINDOW_RAMP
            return (reach.ceil() - 1).clamp(max=self.window.left).long()

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
        blocks_left = ((self.budget + ramp) / (1.0 + ramp)).clamp(min=0.0) * (self.gate > 0)
        ramp = WINDOW_RAMP / radius
        window_left = ((self.span + ramp) / (1.0 + ramp)).clamp(min=1.0 / (radius + WINDOW_RAMP))
        return ((blocks_left * blocks + window_left * window) / (blocks + window)).mean()

    def _rank_weight(self, num_blocks: int) -> torch.Tensor:
        """The budget's weight of the best, second best, ... block: [heads, num_blocks]."""
        rank = torch.arange(1, num_blocks + 1, device=self.budget.device)
        kappa = _precise(self.budget)[:, None] * self.options.num_blocks
        return ((kappa + BUDGET_RAMP - rank) / BUDGET_RAMP).clamp(0.0, 1.0)

    def rank_bias(self, num_blocks: int) -> torch.Tensor:
        """The logarithm of the weight of the best, second best, ... block: [heads, num_blocks]."""
        weights = self._rank_weight(num_blocks).clamp(min=MIN_WEIGHT)
        return weights.log() + self._head_bias()[:, None]

    def _head_bias(self) -> torch.Tensor:
        of_head = _precise(self.strength).clamp(min=MIN_WEIGHT).log()
        return of_head + _precise(self.gate).clamp(min=MIN_WEIGHT).log()

    def _entry_bias(
        self, selected: SelectedBlocks, slots: torch.Tensor, residual: ResidualScores | None
    ) -> torch.Tensor:
        """The logarithm of every entry's weight, 0 for the window, in the shape of `slots`."""
        batch, _, rows, num_ranked = selected.key_blocks.shape
        table = self.rank_bias(num_ranked)[:, None].expand(batch, -1, rows, -1)
        if residual is not None:
            table = table + residual.of_entries(selected.key_blocks)
        if self.global_direction is not None:
            direction = _precise(self.global_direction)[:, None]
            scores = (selected.global_means * direction).sum(dim=-1)
            shared = (scores + self._head_bias()[:, None])[:, :, None]
            table = torch.cat([table, shared.expand(-1, -1, rows, -1)], dim=-1)
        return table.gather(-1, slots.clamp(min=0)).masked_fill(slots < 0, 0.0)

    def attention_span(self) -> AttentionSpan | None:
        """The learned windows; None where they are as wide as the pattern's and stay so."""
        radius = self.window.left
        is_trained = torch.is_grad_enabled() and self.span.requires_grad
        # Not read in training, where it changes with every step: that would wait for the device.
        if not is_trained and not (
            self._read("span", lambda span: bool((span < 1).any()), True)
            or self._read("head_windows", lambda limit: bool((limit < radius).any()), True)
        ):
            return None
        return AttentionSpan(self._span_length(), WINDOW_RAMP)

    def _span_length(self) -> torch.Tensor:
        """How many tokens to either side each head sees with its full weight: [heads].

        Below 0 where a window is shorter than the ramp; a token always sees itself.
        """
        radius = self.window.left
        length = (self.span * radius).clamp(min=1.0 - WINDOW_RAMP)
        # No weight is left one token beyond the calibrated window.
        longest = (self.head_windows + 1 - WINDOW_RAMP).to(length.dtype)
        is_open = (self.head_windows >= radius) | (length <= longest)
        return length.where(is_open, longest).where(self.strength > 0, radius)

    def _read(self, name: str, read: Callable[[torch.Tensor], Any], safe: Any) -> Any:
        """A value on the host that depends on one tensor, read again only when that changes.

        While compiling it is the last one that was read, or `safe`, with which every result is
        right, if slower.
        """
        tensor = getattr(self, name)
        if torch.compiler.is_compiling():
            return self._known[name][2] if name in self._known else safe
        version = None if tensor.is_inference() else tensor._version
        known = self._known.get(name)
        if known is None or version is None or known[0] is not tensor or known[1] != version:
            known = self._known[name] = (tensor, version, read(tensor))
        return known[2]


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def selections(model: nn.Module) -> list[AdaptiveSelection]:
    """The adaptive parts of a model, layer by layer; also of one that PEFT has wrapped."""
    return [
        module.adaptive  # type: ignore[misc]
        for module in model.modules()
        if "adaptive" in module._modules and hasattr(module.adaptive, "rank_limit")
    ]


def set_selection_strength(model: nn.Module, strength: float) -> None:
    """Sets how strongly chosen blocks are read, in every layer and in the configuration.

    Args:
        model: one of our models, as it is or wrapped by PEFT.
        strength: from 0 (they are not read and nothing is computed) to 1 (as the window is).

    Raises:
        ValueError: the number is out of range, or the model's attention_pattern is not "adaptive".
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}, a number from 0 to 1 is needed")
    parts = selections(model)
    if not parts:
        raise ValueError(
            "the model has nothing to select with: load it with attention_pattern='adaptive'"
        )
    for part in parts:
        part.set_strength(strength)


@torch.no_grad()
def mirror_selection_buffers(model: nn.Module, saved: dict[str, Any]) -> None:
    """Makes a loaded model and its configuration agree on what both hold.

    A value that the caller changed in the configuration wins, otherwise the weights do.

    Args:
        model: any of our models.
        saved: the configuration beside the weights, where fields may be missing.
    """
    for part in selections(model):
        for field, name in SELECTION_BUFFERS.items():
            value, buffer = getattr(part.config, field), getattr(part, name)
            if value != saved.get(field, getattr(type(part.config), field)):
                buffer.fill_(value)
            elif buffer.item() != torch.tensor(value, dtype=buffer.dtype).item():
                setattr(part.config, field, buffer.item())
        for name in HEAD_LIMITS:
            if getattr(part.config, name) != saved.get(name):
                getattr(part, name).copy_(part.configured_limit(name))
