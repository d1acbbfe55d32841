"""What a layer reads besides its window and the global tokens, and how strongly."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import initialization as init

from adaptive_longformer.attention.call import AttentionCall, AttentionSpan
from adaptive_longformer.attention.global_keys import GlobalKeys
from adaptive_longformer.attention.join_gradients import JoinGradients
from adaptive_longformer.baselines.oracle_selection import oracle_selection
from adaptive_longformer.baselines.random_selection import random_selection
from adaptive_longformer.configuration.configuration_adaptive_sparse import AdaptiveSparseConfig
from adaptive_longformer.configuration.configuration_adaptive_sparse_seq2seq import (
    AdaptiveSparseSeq2SeqConfig,
)
from adaptive_longformer.modeling.head_budgets import HeadBudgets, write_selection
from adaptive_longformer.patterns.block_layout import BlockLayout, window_layout
from adaptive_longformer.patterns.pattern import Pattern
from adaptive_longformer.selection.exportable_selection import BlockBias, selecting_attention
from adaptive_longformer.selection.head_weights import MIN_WEIGHT, precise
from adaptive_longformer.selection.lists import selection_layout, weights_of_entries
from adaptive_longformer.selection.options import SelectionOptions
from adaptive_longformer.selection.repeated_positions import without_positions
from adaptive_longformer.selection.sampling import NO_SEED
from adaptive_longformer.selection.select_blocks import SelectedBlocks, select_blocks


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


class AdaptiveSelection(HeadBudgets):
    """Chooses blocks of keys for every block of queries, and weighs them as `HeadBudgets` says.

    Blocks that a learned direction chooses for the whole document get the weight strength * gate_h
    * exp(direction . mean key). A learned window per head, `AttentionSpan`, narrows what the
    pattern's window reads.

    Without strength nothing is computed here. All of it is saved, the buffers too, so that PEFT's
    `modules_to_save=["adaptive"]` stores what a task has learned. Under causality a block of
    queries is chosen for by the queries of the block before.

    Args:
        config, layer_idx, is_causal: as of `HeadBudgets`.

    Attributes:
        global_direction: [heads, head_dim], if `num_learned_global_blocks` is not 0.
    """

    global_direction: nn.Parameter | None

    def __init__(
        self,
        config: AdaptiveSparseConfig | AdaptiveSparseSeq2SeqConfig,
        layer_idx: int,
        is_causal: bool = False,
    ) -> None:
        super().__init__(config, layer_idx, is_causal)
        heads = config.num_attention_heads
        head_dim = config.hidden_size // heads
        self.global_direction = None
        if config.num_learned_global_blocks:
            self.global_direction = nn.Parameter(torch.zeros(heads, head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Everything as in a fresh layer, except what a checkpoint brought."""
        super().reset_parameters()
        if self.global_direction is not None:
            init.zeros_(self.global_direction)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        global_keys: GlobalKeys | None = None,
        state: SelectionState | None = None,
    ) -> tuple[torch.Tensor, Reads]:
        """Says what the layer reads.

        Args:
            query, key: [batch, heads, length, head_dim]; blocks start at slot 0, where each row's
                first valid token should be.
            attention_mask: bool [batch, length], True where a token is not padding; None: all are.
            global_keys: the global tokens; None: none is.
            state: of this forward pass; None: nothing is remembered.

        Returns:
            The query, and what the layer reads: through the two every trainable parameter of this
            module gets a gradient, zeros if it took no part.
        """
        if not self.is_active:
            return self._joined(query), Reads(self.pattern)
        length = query.shape[2]
        options = self._selection_options()
        # Where the window reaches everywhere there is nothing to choose.
        is_choosing = options is not None and length > self.window.left + 1
        weights = self.weights(is_choosing, self.narrows())
        if options is None or not is_choosing:
            if weights.reach is None:
                return self._joined(query), Reads(self.pattern)
            # In the blocks of the selection: calibration then changes no sum's order.
            narrow = window_layout(
                self.window,
                length,
                weights.reach,
                query_block_size=self.options.query_block_size,
                key_block_size=self.options.block_size,
            )
            return self._joined(query), Reads(narrow, span=weights.span)
        selected = None if state is None else state.selected
        if selected is None:
            selected = self._select(
                query.detach(),
                self._keys_of_choice(key.detach(), attention_mask),
                attention_mask,
                global_keys,
                options,
                validate=state is not None and state.validate,
            )
            if state is not None:
                state.selected = selected
        assert weights.log_weights is not None
        log_weights = weights.log_weights[None]
        if self.global_direction is not None:
            selected, log_weights = self._with_shared(selected, log_weights, self.global_direction)
        layout, slots = selection_layout(
            selected, self.window, length, options, weights.rank_limit, weights.reach
        )
        of_rows = log_weights[:, :, None].expand(*slots.shape[:3], -1)
        entry_bias = of_rows.gather(-1, slots)
        if (of_entries := weights_of_entries(selected, slots)) is not None:
            entry_bias = entry_bias + of_entries
        return query, Reads(layout, entry_bias, weights.span)

    def _keys_of_choice(
        self, key: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """The keys as the choice sees them; see `without_positions`. Under causality they are as
        they are: the mean of a place would tell its first tokens about its last ones.
        """
        period = self._repeated_length
        if period is None or key.shape[2] <= period:
            return key
        seen = precise(key)
        is_counted = seen.isfinite().all(dim=-1, keepdim=True)
        if attention_mask is not None:
            is_counted = is_counted & attention_mask[:, None, :, None]
        return without_positions(seen, is_counted, period).to(key.dtype)

    @property
    def _repeated_length(self) -> int | None:
        """After how many tokens the choice meets the same positions again and does not see them;
        None: keys are as they are. Sampling is for what the attention itself would read.
        """
        is_own = self.config.attention_pattern == "adaptive" and not self.is_causal
        is_hidden = is_own and self.options.sampling_seed == NO_SEED
        return self.config.repeated_length if is_hidden else None

    def _with_shared(
        self, selected: SelectedBlocks, log_weights: torch.Tensor, direction: torch.Tensor
    ) -> tuple[SelectedBlocks, torch.Tensor]:
        """The choice without what closed heads do not read of the blocks for the whole row; and
        the weights [batch, heads, 1 + num_blocks + num_global_blocks] with those of such blocks.
        """
        opening = precise(self.gate) * precise(self.strength)
        is_open = selected.global_open & (opening > 0)[:, None, None]
        scores = (selected.global_means * precise(direction)[:, None]).sum(dim=-1)
        shared = scores + opening.clamp(min=MIN_WEIGHT).log()[:, None]
        ranked = log_weights[..., : 1 + selected.key_blocks.shape[-1]]
        log_weights = torch.cat([ranked.expand(len(shared), -1, -1), shared], dim=-1)
        return selected._replace(global_open=is_open), log_weights

    def _joined(self, query: torch.Tensor) -> torch.Tensor:
        """The query, through which parameters that take no part get gradients of zero."""
        if not torch.is_grad_enabled():
            return query
        return JoinGradients.apply(query, *self.parameters())  # type: ignore[return-value]

    @property
    def is_exported(self) -> bool:
        """Whether `attend` stands for the choice and the attention to it: torch.export and ONNX
        know none of their operators.
        """
        is_known = self.config.attention_pattern == "adaptive" and not self.is_causal
        return is_known and self.is_active and torch.compiler.is_exporting()

    def reads_of_graph(self) -> Reads:
        """What `attend` is called with."""
        return Reads(self.window, span=self.weights(False, self.narrows()).span)

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """The output [batch, heads, length, head_dim] of a call of `reads_of_graph`, and of what
        `forward` would choose.
        """
        options = replace(self.options, num_blocks=max(self.most_blocks(), 1))
        weights = self.weights()
        assert weights.log_weights is not None and weights.rank_limit is not None
        ranks = weights.log_weights[:, 1 : 1 + options.num_blocks]
        rank = torch.arange(options.num_blocks, device=ranks.device)
        ranks = ranks.masked_fill(rank >= weights.rank_limit[:, None], -torch.inf)
        bias = BlockBias(ranks)
        if self.global_direction is not None:
            opening = precise(self.gate) * precise(self.strength)
            shared = opening.clamp(min=MIN_WEIGHT).log().masked_fill(opening <= 0, -torch.inf)
            bias = BlockBias(ranks, precise(self.global_direction), shared)
        return selecting_attention(call, options, bias, self._repeated_length)

    def choose_next(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        attention_mask: torch.Tensor | None,
        global_mask: torch.Tensor | None,
        means: tuple[torch.Tensor, torch.Tensor] | None = None,
        validate: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """What one block of queries reads in cached decoding, best first.

        Args:
            query: [batch, heads, query_block_size + 1, head_dim], those of the block before, and
                the first of the block.
            key: [batch, heads, length, head_dim], up to the first token of the block.
            attention_mask, global_mask: bool [batch, length] as in `forward`.
            means: of keys, as `select_blocks` takes them; None: they are computed.
            validate: whether to raise on values that are not finite.

        Returns:
            Key blocks, int32 [batch, heads, at most num_selected_blocks]; how many of them count,
            int32 [batch, heads]; and what is added to the scores of each, or None.
        """
        options = self._selection_options()
        if options is None:
            nothing = query.new_zeros(query.shape[:2], dtype=torch.int32)
            return nothing[..., None], nothing, None
        selected = self._select(
            query, key, attention_mask, global_mask, options, means=means, validate=validate
        )
        return selected.of_last_row()

    def _selection_options(self) -> SelectionOptions | None:
        """The options, with no more blocks than the widest head may read; None: none are read."""
        num_blocks = self.most_blocks()
        if num_blocks == 0 and self.options.num_global_blocks == 0:
            return None
        return replace(self.options, num_blocks=max(num_blocks, 1))

    def _select(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        attention_mask: torch.Tensor | None,
        global_mask: torch.Tensor | GlobalKeys | None,
        options: SelectionOptions,
        *,
        validate: bool,
        means: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> SelectedBlocks:
        """The choice, or that of one of the controls it is compared with."""
        masks: dict[str, Any] = {"attention_mask": attention_mask, "global_mask": global_mask}
        if self.config.attention_pattern != "adaptive" and isinstance(global_mask, GlobalKeys):
            masks["global_mask"] = global_mask.mask
        if self.config.attention_pattern == "random_selection":
            return random_selection(query, self.window, options, seed=self.layer_idx, **masks)
        if self.config.attention_pattern == "oracle":
            return oracle_selection(query, key, self.window, options, **masks)
        return select_blocks(
            query,
            key,
            self.window,
            options,
            **masks,
            max_global_tokens=self.config.max_global_tokens,
            is_causal=self.is_causal,
            global_directions=self.global_direction,
            means=means,
            validate=validate,
        )


def selections(model: nn.Module) -> list[AdaptiveSelection]:
    """The adaptive parts of a model, layer by layer; also of one that PEFT has wrapped."""
    return [
        module.adaptive  # type: ignore[misc]
        for module in model.modules()
        if "adaptive" in module._modules and hasattr(module.adaptive, "choose_next")
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
    write_selection(parts, selection_strength=float(strength))
