"""BigBird: global blocks at both ends, a window of blocks, and random blocks."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch

from adaptive_longformer.patterns.block_layout import (
    BlockLayout,
    EntryFlag,
    check_block_sizes,
    known_right,
)
from adaptive_longformer.patterns.cached_tensors import kept_in_graphs, ready_for_every_stream
from adaptive_longformer.patterns.mixing import mix
from adaptive_longformer.patterns.pattern import Pattern, check_whole

_WHOLE_BLOCK = int(EntryFlag.SELECTED | EntryFlag.FULL)


@dataclass(frozen=True)
class BigBird(Pattern):
    """A query sees its own block, the blocks beside it, and the first and the last block; these two
    see everything. Up to `dense_length` tokens every query sees every key.

    Source: Zaheer et al. 2020, section 2, with the blocks of the authors' code.

    Note:
        A rule can only say which keys are seen. The random blocks of training, and the weight that
        the first block has in their place otherwise, are in `big_bird_layout`.
    """

    name: ClassVar[str] = "big_bird"
    block_size: int = 64
    num_random_blocks: int = 3

    def __post_init__(self) -> None:
        check_whole("BigBird", 1, num_random_blocks=self.num_random_blocks)
        check_block_sizes("BigBird", block_size=self.block_size)
        super().__post_init__()

    @property
    def dense_length(self) -> int:
        """The longest sequence that is read in full, in tokens: 2 global blocks, 3 of the window,
        and room for the random ones.
        """
        return (5 + 2 * self.num_random_blocks) * self.block_size

    def allowed(self, query_index, key_index, head_index, length):
        if length <= self.dense_length:
            shape = torch.broadcast_shapes(query_index.shape, key_index.shape)
            return torch.ones(shape, dtype=torch.bool, device=query_index.device)
        query_block = query_index // self.block_size
        key_block = key_index // self.block_size
        last = (length - 1) // self.block_size
        near = (query_block - key_block).abs() <= 1
        is_global = (query_block == 0) | (query_block == last)
        return near | is_global | (key_block == 0) | (key_block == last)


def big_bird_layout(
    pattern: BigBird,
    length: int,
    *,
    draw: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
) -> BlockLayout:
    """The lists of key blocks of BigBird's attention, shared by all heads.

    The first and the last block read every block. Every other block reads these two, itself and its
    neighbours, and

    - with `draw`: `pattern.num_random_blocks` distinct random blocks that are none of those;
    - without: nothing more, but its scores of the first block get log(1 + num_random_blocks).
      Outside of training, the implementation in Transformers reads the first block in place of
      every random one, and published checkpoints are evaluated like that.

    Args:
        pattern: the size of the blocks and the number of random ones.
        length: tokens in the sequence, above `BigBird.dense_length`; a last block that is not
            complete is the last block nevertheless.
        draw: int64 scalar tensor that says which random blocks, see `random_draw`. The same number
            gives the same blocks on every device; no random generator is touched.
        device: where the tensors of the layout live.

    Returns:
        A layout without a window; cached as long as nothing is drawn.

    Raises:
        ValueError: the sequence is so short that everything is read.

    Note:
        The lists of the two global blocks make the tensors as wide as the number of blocks:
        12 bytes for every pair of blocks, 48 MB for 131,072 tokens in blocks of 64.
    """
    if length <= pattern.dense_length:
        raise ValueError(
            f"big_bird_layout: length is {length}, more than {pattern.dense_length} = "
            "(5 + 2 * num_random_blocks) * block_size is needed: shorter ones are read in full"
        )
    device = torch.device(device)
    if draw is not None or torch.compiler.is_compiling():
        return _build_layout(pattern, length, draw, device)
    return kept_in_graphs(_cached_layout(pattern, length, device), device)


def random_draw(seed: int, layer_idx: int, step: torch.Tensor) -> torch.Tensor:
    """The number a layer draws its random blocks with: int64 scalar tensor, a hash of all three.

    Args:
        seed: of the whole model.
        layer_idx: layers draw independently.
        step: int64 scalar tensor, the number of the training step.
    """
    return mix(mix(mix(step) + seed) + layer_idx)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _cached_layout(pattern: BigBird, length: int, device: torch.device) -> BlockLayout:
    return ready_for_every_stream(_build_layout(pattern, length, None, device), device)


def _build_layout(
    pattern: BigBird, length: int, draw: torch.Tensor | None, device: torch.device
) -> BlockLayout:
    num_blocks = -(-length // pattern.block_size)
    last = num_blocks - 1
    block = torch.arange(num_blocks, device=device)
    row = block[1:-1, None]
    always = torch.ones_like(row, dtype=torch.bool)
    # A neighbour that is a global block is named already.
    entries = [(row * 0, always), (row, always), (row * 0 + last, always)]
    entries += [(row - 1, row - 1 > 0), (row + 1, row + 1 < last)]
    if draw is not None:
        chosen = _random_blocks(row, num_blocks, pattern.num_random_blocks, draw)
        entries += [(column, always) for column in chosen]
    named = torch.cat([column for column, _ in entries], dim=1)
    is_used = torch.cat([used for _, used in entries], dim=1)
    order = torch.argsort(is_used.int(), dim=1, descending=True, stable=True)

    key_blocks = torch.zeros(num_blocks, num_blocks, dtype=torch.int32, device=device)
    key_blocks[0] = key_blocks[-1] = block.int()
    key_blocks[1:-1, : len(entries)] = named.gather(1, order).int()
    counts = torch.full((num_blocks,), num_blocks, dtype=torch.int32, device=device)
    counts[1:-1] = is_used.sum(dim=1, dtype=torch.int32)
    bias = None
    if draw is None:
        bias = torch.zeros(key_blocks.shape, device=device)
        bias[1:-1, 0] = math.log(1 + pattern.num_random_blocks)
        bias = bias[None, None]
    layout = BlockLayout(
        key_blocks=key_blocks[None, None],
        counts=counts[None, None],
        flags=torch.full_like(key_blocks, _WHOLE_BLOCK)[None, None],
        query_block_size=pattern.block_size,
        key_block_size=pattern.block_size,
        length=length,
        bias=bias,
    )
    return known_right(layout)


def _random_blocks(
    row: torch.Tensor, num_blocks: int, count: int, draw: torch.Tensor
) -> list[torch.Tensor]:
    """`count` distinct blocks per row, each [rows, 1], neither global nor in the row's window.

    Robert Floyd's algorithm: every set of `count` of the free blocks is equally likely.
    """
    window_start = (row - 1).clamp(min=1)
    window_size = (row + 1).clamp(max=num_blocks - 2) - window_start + 1
    num_free = num_blocks - 2 - window_size
    chosen: list[torch.Tensor] = []
    for index in range(count):
        highest = num_free - count + index
        number = mix(draw ^ mix(row * count + index)) % (highest + 1)
        for earlier in chosen:
            number = number.where(number != earlier, highest)
        chosen.append(number)
    # From the number of a free block to the block: the first block and the window are not free.
    return [number + 1 + window_size * (number + 1 >= window_start).long() for number in chosen]
