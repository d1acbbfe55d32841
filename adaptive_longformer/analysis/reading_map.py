"""Heat maps of who reads whom: blocks of queries against blocks of keys."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adaptive_longformer.analysis.watching import watch
from adaptive_longformer.attention.global_keys import GlobalKeys
from adaptive_longformer.modeling.adaptive_selection import AdaptiveSelection, Reads
from adaptive_longformer.patterns.block_layout import BlockLayout, EntryFlag, block_layout

_HOW_TO_READ = """\
The diagonal is the window. A line parallel to it is a distance that is read from everywhere,
a vertical line a place that all read: look what is there. Tokens are counted from the first valid \
one."""

_AT_MULTIPLES: dict[str, Any] = {"color": "tab:green", "linestyle": ":", "linewidth": 1.0}


@dataclass(frozen=True)
class ReadingMap:
    """What the blocks of queries of one layer read of the first sequence.

    Attributes:
        shares: float [query_blocks, key_blocks], the share of the heads that have a block of keys
            in the list of a block of queries, 0 to 1. Global tokens are not in the lists.
        selected: as `shares`, of the blocks that were chosen besides the window.
        has_global: bool [key_blocks], whether a token of the block is global, which all read.
        query_block_size, key_block_size: tokens in a block.
    """

    shares: torch.Tensor
    selected: torch.Tensor
    has_global: torch.Tensor
    query_block_size: int
    key_block_size: int

    def share_at_multiples(self, period: int) -> float:
        """Of what was selected, the share of blocks with a token that is a multiple of `period`
        tokens, but not 0, from one of the queries; 0 if nothing was.
        """
        query = torch.arange(self.selected.shape[0], device=self.selected.device)
        key = torch.arange(self.selected.shape[1], device=self.selected.device)
        # From the last token of the key block to the first query, and on to the last query.
        last = key * self.key_block_size + self.key_block_size - 1
        offset = last - (query * self.query_block_size)[:, None]
        width = self.query_block_size + self.key_block_size - 1
        is_multiple = (offset % period < width) & (offset // period != 0)
        total = self.selected.sum().clamp(min=torch.finfo(torch.float32).tiny)
        return float((self.selected * is_multiple).sum() / total)


def reading_maps(model: nn.Module, batch: Mapping[str, Any]) -> list[ReadingMap]:
    """For every layer who reads whom. O(blocks^2) memory: for inspection.

    Args:
        model: a model with attention_pattern "adaptive", as it is or wrapped by PEFT.
        batch: what its forward takes; the first sequence is shown, its blocks counted from its
            first valid token.

    Raises:
        ValueError: the model has no adaptive layers.
    """
    maps: dict[int, ReadingMap] = {}

    def see(number: int, part: AdaptiveSelection, args: tuple, reads: Reads) -> None:
        maps[number] = _map(part, args[0], args[2], args[3], reads.pattern_or_layout)

    watch(model, batch, see)
    return [maps[number] for number in sorted(maps)]


def save_reading_maps(
    maps: list[ReadingMap], file: str | Path, title: str = "", period: int | None = None
) -> None:
    """Draws the maps side by side into a PNG, with lines at the multiples of a distance in tokens,
    see `config.repeated_length`.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ValueError(
            "matplotlib is not installed, the figure needs it: pip install matplotlib"
        ) from error
    columns = min(4, len(maps))
    rows = -(-len(maps) // columns)
    figure = Figure(figsize=(max(7.5, 3.2 * columns), 1.3 + 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(maps) :]:
        axis.set_axis_off()
    image = None
    for number, (axis, reads) in enumerate(zip(axes.flat, maps)):
        num_queries, num_keys = reads.shares.shape
        width, height = num_keys * reads.key_block_size, num_queries * reads.query_block_size
        image = axis.imshow(
            reads.shares.cpu().numpy(), vmin=0, vmax=1, cmap="magma", interpolation="nearest",
            extent=(0, width, height, 0),
        )  # fmt: skip
        for block in reads.has_global.nonzero().flatten().tolist():
            start = block * reads.key_block_size
            axis.axvspan(start, start + reads.key_block_size, color="tab:cyan")
        for offset in range(period, max(width, height), period) if period else ():
            for start in ((offset, 0), (0, offset)):
                axis.axline(start, slope=1, **_AT_MULTIPLES)
        axis.set(title=f"layer {number}", xlabel="token that is read", ylabel="token that reads")
        axis.set(xlim=(0, width), ylim=(height, 0))
    assert image is not None  # a model has layers
    figure.colorbar(image, ax=axes, label="share of heads that read it", shrink=0.7)
    figure.suptitle(title or "Who reads whom")
    label = "block with a global token, which all read and which reads all"
    handles: list[Any] = [Patch(color="tab:cyan", label=label)]
    if period:
        label = f"multiples of {period} tokens, where the position is the same"
        handles.append(Line2D([], [], label=label, **_AT_MULTIPLES))
    figure.legend(
        handles=handles, loc="outside lower center",
        title=_HOW_TO_READ, fontsize=8, title_fontsize=8, frameon=False,
    )  # fmt: skip
    figure.savefig(file, dpi=120)


def _map(
    part: AdaptiveSelection,
    query: torch.Tensor,
    attention_mask: torch.Tensor | None,
    global_keys: GlobalKeys | None,
    reads: Any,
) -> ReadingMap:
    length, size, key_size = query.shape[2], part.options.query_block_size, part.options.block_size
    if not isinstance(reads, BlockLayout):
        reads = block_layout(
            part.window, length, query_block_size=size, key_block_size=key_size, device=query.device
        )
    index = reads.key_blocks[0].long().where(reads.used[0], 0)
    is_selected = (reads.flags[0] & EntryFlag.SELECTED) != 0

    def share(entries: torch.Tensor) -> torch.Tensor:
        shape = (*reads.counts[0].shape, reads.num_key_blocks)
        found = torch.zeros(shape, dtype=torch.float32, device=query.device)
        found.scatter_add_(-1, index, (entries & reads.used[0]).float())
        return found.clamp(max=1.0).mean(dim=0)  # an edge block has two entries

    valid = length if attention_mask is None else int(attention_mask[0].sum())
    num_queries, num_keys = -(-valid // size), -(-valid // key_size)
    has_global = torch.zeros(num_keys, dtype=torch.bool, device=query.device)
    if global_keys is not None:
        has_global[global_keys.mask[0, :valid].nonzero().flatten() // key_size] = True
    shares, selected = (
        share(entries)[:num_queries, :num_keys] for entries in (reads.used[0], is_selected)
    )
    return ReadingMap(shares, selected, has_global, size, key_size)
