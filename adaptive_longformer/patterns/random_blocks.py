"""Random blocks: every query block sees a few key blocks drawn by a hash."""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch

from adaptive_longformer.patterns.mixing import mix
from adaptive_longformer.patterns.pattern import Pattern, check_whole


@dataclass(frozen=True)
class RandomBlocks(Pattern):
    """Each query block sees `num_blocks` distinct key blocks drawn by a hash of (seed, query block,
    key block).

    The draw is a pure function of its arguments: the same on every device, in training and
    evaluation, and under activation checkpointing; no global random generator is touched. With
    fewer blocks in the sequence than `num_blocks` all of them are seen. Source: Zaheer et al. 2020,
    section 2.
    """

    name: ClassVar[str] = "random_blocks"
    num_blocks: int = 3
    block_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("RandomBlocks", 1, num_blocks=self.num_blocks, block_size=self.block_size)
        check_whole("RandomBlocks", 0, seed=self.seed)
        super().__post_init__()

    def chosen_blocks(self, length: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """The drawn key blocks, int64 [num_query_blocks, min(num_blocks, num_key_blocks)]."""
        return _chosen_blocks(self, length).to(device)

    def allowed(self, query_index, key_index, head_index, length):
        chosen = self.chosen_blocks(length, query_index.device)
        query_block = query_index // self.block_size
        key_block = key_index // self.block_size
        return (chosen[query_block] == key_block[..., None]).any(dim=-1)


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _chosen_blocks(pattern: RandomBlocks, length: int) -> torch.Tensor:
    num_blocks = -(-length // pattern.block_size)
    index = torch.arange(num_blocks)
    row = mix(index ^ mix(torch.tensor(pattern.seed)))[:, None]
    rank = mix(row ^ mix(index + 0x5BD1E995))  # [query_block, key_block]
    return rank.topk(min(pattern.num_blocks, num_blocks), dim=1, largest=False).indices
