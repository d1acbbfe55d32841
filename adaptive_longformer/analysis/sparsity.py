"""What a model reads: keys per query by source, what it misses, what its heads have learned."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from adaptive_longformer.analysis.watching import watch
from adaptive_longformer.modeling.adaptive_selection import AdaptiveSelection, Reads
from adaptive_longformer.patterns.block_layout import BlockLayout, EntryFlag

# What the columns of `SparsityReport.table` are.
LEGEND = """\
keys/query   keys that a query reads: tokens of its window, global tokens, tokens of selected blocks
blocks       selected blocks in the list of a block of queries
missed mass  attention that full attention would give to keys that are not read; 0 misses nothing
recall       of the blocks with the most exact attention, as many as were selected, the share that
             was selected; 1 chooses the best ones
budgets      blocks that each head may select
windows      tokens to each side that each head sees"""


@dataclass(frozen=True)
class LayerSparsity:
    """One layer, means over the sampled queries and the heads unless said otherwise.

    Attributes:
        window_keys, global_keys, selected_keys: keys of nonzero weight that a query reads, by
            source; a global token counts as such only.
        selected_blocks: entries in the list of a query block besides its window.
        missed_mass: attention that full attention would give to keys that are not read.
        recall: share of the blocks with the most exact attention, as many as were selected, that
            the selection has; in a causal model, of the blocks that end before the queries' begins.
        head_budgets: blocks each head may select.
        head_windows: tokens to each side that each head sees.
        head_gates: weight of what each head selects.
    """

    window_keys: float
    global_keys: float
    selected_keys: float
    selected_blocks: float
    missed_mass: float
    recall: float
    head_budgets: list[int]
    head_windows: list[int]
    head_gates: list[float]

    @property
    def keys_per_query(self) -> float:
        """Keys of nonzero weight that a query reads."""
        return self.window_keys + self.global_keys + self.selected_keys


@dataclass(frozen=True)
class SparsityReport:
    """All layers of a model on one batch.

    Attributes:
        layers: one entry per layer.
        strength: how strongly selected blocks are read.
    """

    layers: list[LayerSparsity]
    strength: float

    @property
    def keys_per_query(self) -> float:
        """Mean over the layers."""
        return sum(layer.keys_per_query for layer in self.layers) / len(self.layers)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {**asdict(self), "keys_per_query": self.keys_per_query}

    def table(self) -> str:
        """One line per layer."""
        budgets = [" ".join(map(str, layer.head_budgets)) for layer in self.layers]
        width = max(map(len, ["budgets", *budgets]))
        lines = [
            "layer  keys/query  window  global  selected  blocks  missed mass  recall  "
            f"{'budgets':<{width}}  windows"
        ]
        for number, (layer, budget) in enumerate(zip(self.layers, budgets)):
            lines.append(
                f"{number:>5}  {layer.keys_per_query:>10.1f}  {layer.window_keys:>6.1f}  "
                f"{layer.global_keys:>6.1f}  {layer.selected_keys:>8.1f}  "
                f"{layer.selected_blocks:>6.2f}  {layer.missed_mass:>11.4f}  "
                f"{layer.recall:>6.3f}  {budget:<{width}}  "
                + " ".join(map(str, layer.head_windows))
            )
        return "\n".join(lines)


def sparsity_report(
    model: nn.Module, batch: Mapping[str, Any], *, sampled_blocks: int = 8
) -> SparsityReport:
    """Runs a model on a batch and says what its adaptive layers read.

    Args:
        model: a model with attention_pattern "adaptive", as it is or wrapped by PEFT.
        batch: what its forward takes.
        sampled_blocks: query blocks per sequence, evenly spread, in which every query is compared
            with all keys: O(sampled_blocks * length) memory.

    Raises:
        ValueError: the model has no adaptive layers, or sampled_blocks is not at least 1.
    """
    if sampled_blocks < 1:
        raise ValueError(f"sampled_blocks is {sampled_blocks}, at least 1 is needed")
    layers: dict[int, LayerSparsity] = {}
    strengths: list[float] = []

    def see(number: int, part: AdaptiveSelection, args: tuple, reads: Reads) -> None:
        layers[number] = _measure(part, args, reads, sampled_blocks)
        strengths.append(float(part.strength))

    watch(model, batch, see)
    return SparsityReport([layers[number] for number in sorted(layers)], max(strengths))


def _measure(
    part: AdaptiveSelection, args: tuple, reads: Reads, sampled_blocks: int
) -> LayerSparsity:
    query, key, attention_mask, global_keys = args[:4]
    batch, heads, length, head_dim = query.shape
    size, key_size = part.options.query_block_size, part.options.block_size
    every = torch.ones(batch, length, dtype=torch.bool, device=query.device)
    valid = every if attention_mask is None else attention_mask
    is_global = ~every if global_keys is None else global_keys.mask
    window = part.weights().reach if reads.span is not None else None
    names = ("window", "global", "selected", "missed", "hits", "wanted", "rows")
    sums: dict[str, float] = dict.fromkeys(names, 0.0)
    position = torch.arange(length, device=query.device)
    block_of_key = position // key_size
    num_rows = -(-length // size)
    for row in sorted(set(torch.linspace(0, num_rows - 1, sampled_blocks).long().tolist())):
        tokens = position[row * size : (row + 1) * size]
        asks = (valid & ~is_global)[:, tokens]  # [batch, tokens]
        if not asks.any():
            continue
        offset = position - tokens[:, None]  # [tokens, length]
        past = offset <= (0 if part.is_causal else length)
        assert part.window.right is not None
        near = (offset >= -part.window.left) & (offset <= part.window.right)
        near = near.expand(batch, heads, -1, -1)
        in_window = near
        if window is not None:
            in_window = near & (offset.abs() <= window[:, None, None])
        chosen = _chosen_blocks(reads, row, batch, heads, -(-length // key_size), query.device)
        selected = chosen[..., block_of_key][:, :, None] & ~near
        ordinary = (valid & ~is_global)[:, None, None]
        in_window, selected = in_window & ordinary, selected & ordinary
        seen_global = (is_global[:, None, None] & past).expand_as(in_window)
        scores = (query[:, :, tokens].float() @ key.float().mT) * head_dim**-0.5
        scores = scores.masked_fill(~(valid[:, None, None] & past), -torch.inf)
        attention = scores.softmax(dim=-1)
        weight = asks[:, None, :].expand(-1, heads, -1)
        read = in_window | selected | seen_global
        for name, visible in (
            ("window", in_window), ("global", seen_global), ("selected", selected)
        ):  # fmt: skip
            sums[name] += float((visible.sum(dim=-1) * weight).sum())
        missed = (attention * ~read).sum(dim=-1)
        sums["missed"] += float(missed[weight].sum())
        sums["rows"] += float(weight.sum())
        # Exact attention of the whole query block to every block, besides window and globals.
        may_choose = ~near & ordinary
        if part.is_causal:
            may_choose = may_choose & ((block_of_key + 1) * key_size <= row * size)
        far = attention * may_choose * weight[..., None]
        of_block = far.new_zeros(batch, heads, chosen.shape[-1])
        of_block.index_add_(-1, block_of_key, far.sum(dim=2))
        ranked = of_block.argsort(dim=-1, descending=True)
        rank = torch.arange(ranked.shape[-1], device=ranked.device)
        is_best = rank < chosen.sum(dim=-1, keepdim=True)
        hits = chosen.gather(-1, ranked) & is_best
        sums["hits"] += float(hits.sum())
        sums["wanted"] += float(is_best.sum())
    count = max(sums["rows"], 1.0)
    head_budgets, head_windows = part.limits()
    return LayerSparsity(
        window_keys=sums["window"] / count,
        global_keys=sums["global"] / count,
        selected_keys=sums["selected"] / count,
        selected_blocks=_mean_list_length(reads, valid, size),
        missed_mass=sums["missed"] / count,
        recall=sums["hits"] / sums["wanted"] if sums["wanted"] else 1.0,
        head_budgets=head_budgets,
        head_windows=head_windows,
        head_gates=part.gate.tolist(),
    )


def _chosen_blocks(
    reads: Reads, row: int, batch: int, heads: int, num_blocks: int, device: torch.device
) -> torch.Tensor:
    """Which blocks are in the list of a query block besides its window: bool [batch, heads,
    num_blocks].
    """
    chosen = torch.zeros(batch, heads, num_blocks, dtype=torch.int32, device=device)
    layout = reads.pattern_or_layout
    if isinstance(layout, BlockLayout):
        is_selected = (layout.flags[:, :, row] & EntryFlag.SELECTED) != 0
        chosen.scatter_add_(-1, layout.key_blocks[:, :, row].long(), is_selected.int())
    return chosen > 0


def _mean_list_length(reads: Reads, valid: torch.Tensor, size: int) -> float:
    layout = reads.pattern_or_layout
    if not isinstance(layout, BlockLayout):
        return 0.0
    lengths = ((layout.flags & EntryFlag.SELECTED) != 0).sum(dim=-1).float()  # [batch, heads, rows]
    filler = -valid.shape[1] % size
    has_query = torch.nn.functional.pad(valid, (0, filler)).unflatten(1, (-1, size)).any(dim=-1)
    return float(lengths.mean(dim=1)[has_query].mean())
