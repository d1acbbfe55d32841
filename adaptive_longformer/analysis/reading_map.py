"""Heat maps of who reads whom: blocks of queries against blocks of keys."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adaptive_longformer.analysis.watching import watch
from adaptive_longformer.modeling.adaptive_selection import AdaptiveSelection, Reads
from adaptive_longformer.patterns.block_layout import BlockLayout, block_layout


def reading_maps(model: nn.Module, batch: Mapping[str, Any]) -> list[torch.Tensor]:
    """For every layer the share of its heads that have a block of keys in a block of queries' list.

    Global tokens are not in the lists. O(blocks^2) memory: for inspection.

    Args:
        model: a model with attention_pattern "adaptive", as it is or wrapped by PEFT.
        batch: what its forward takes; the first sequence is shown, its blocks counted from its
            first valid token.

    Returns:
        One float tensor [query_blocks, key_blocks] per layer, values from 0 to 1.

    Raises:
        ValueError: the model has no adaptive layers.
    """
    maps: dict[int, torch.Tensor] = {}

    def see(number: int, part: AdaptiveSelection, args: tuple, reads: Reads) -> None:
        maps[number] = _map(part, args[0], args[2], reads.pattern_or_layout)

    watch(model, batch, see)
    return [maps[number] for number in sorted(maps)]


def save_reading_maps(maps: list[torch.Tensor], file: str | Path) -> None:
    """Draws the maps side by side into a PNG.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            "matplotlib is not installed, the figure needs it: pip install matplotlib"
        ) from error
    columns = min(4, len(maps))
    rows = -(-len(maps) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(maps) :]:
        axis.set_axis_off()
    image = None
    for number, (axis, shares) in enumerate(zip(axes.flat, maps)):
        image = axis.imshow(
            shares.cpu().numpy(), vmin=0, vmax=1, cmap="magma", interpolation="nearest"
        )
        axis.set(title=f"layer {number}", xlabel="block of keys", ylabel="block of queries")
    if image is not None:
        figure.colorbar(image, ax=axes, label="share of heads that read it", shrink=0.7)
    figure.savefig(file, dpi=120)


def _map(
    part: AdaptiveSelection,
    query: torch.Tensor,
    attention_mask: torch.Tensor | None,
    reads: Any,
) -> torch.Tensor:
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
    return shares[: -(-valid // size), : -(-valid // key_size)]
