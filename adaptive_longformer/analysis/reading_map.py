"""Heat maps of who reads whom: blocks of queries against blocks of keys."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adaptive_longformer.analysis.watching import watch
from adaptive_longformer.modeling.adaptive_selection import AdaptiveSelection, Reads
from adaptive_longformer.patterns.block_layout import BlockLayout, block_layout

_HOW_TO_READ = """\
The diagonal is the window. A line parallel to it is a distance that is read from everywhere,
a vertical line a place that all read: look what is there. Tokens are counted from the first valid \
one."""


@dataclass(frozen=True)
class ReadingMap:
    """What the blocks of queries of one layer read of the first sequence.

    Attributes:
        shares: float [query_blocks, key_blocks], the share of the heads that have a block of keys
            in the list of a block of queries, 0 to 1. Global tokens are not in the lists.
        has_global: bool [key_blocks], whether a token of the block is global, which all read.
        query_block_size, key_block_size: tokens in a block.
    """

    shares: torch.Tensor
    has_global: torch.Tensor
    query_block_size: int
    key_block_size: int


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


def save_reading_maps(maps: list[ReadingMap], file: str | Path, title: str = "") -> None:
    """Draws the maps side by side into a PNG.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
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
        axis.set(title=f"layer {number}", xlabel="token that is read", ylabel="token that reads")
    assert image is not None  # a model has layers
    figure.colorbar(image, ax=axes, label="share of heads that read it", shrink=0.7)
    figure.suptitle(title or "Who reads whom")
    label = "block with a global token, which all read and which reads all"
    figure.legend(
        handles=[Patch(color="tab:cyan", label=label)], loc="outside lower center",
        title=_HOW_TO_READ, fontsize=8, title_fontsize=8, frameon=False,
    )  # fmt: skip
    figure.savefig(file, dpi=120)


def _map(
    part: AdaptiveSelection,
    query: torch.Tensor,
    attention_mask: torch.Tensor | None,
    global_mask: torch.Tensor | None,
    reads: Any,
) -> ReadingMap:
    length, size, key_size = query.shape[2], part.options.query_block_size, part.options.block_size
    if not isinstance(reads, BlockLayout):
        reads = block_layout(
            part.window, length, query_block_size=size, key_block_size=key_size, device=query.device
        )
    shares = torch.zeros(
        *reads.counts[0].shape, reads.num_key_blocks, dtype=torch.float32, device=query.device
    )
    index = reads.key_blocks[0].long().where(reads.used[0], 0)
    shares.scatter_add_(-1, index, reads.used[0].float())
    shares = shares.clamp(max=1.0).mean(dim=0)  # an edge block has two entries
    valid = length if attention_mask is None else int(attention_mask[0].sum())
    num_queries, num_keys = -(-valid // size), -(-valid // key_size)
    has_global = torch.zeros(num_keys, dtype=torch.bool, device=query.device)
    if global_mask is not None:
        has_global[global_mask[0, :valid].nonzero().flatten() // key_size] = True
    return ReadingMap(shares[:num_queries, :num_keys], has_global, size, key_size)
