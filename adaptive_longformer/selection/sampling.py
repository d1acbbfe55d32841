"""Blocks drawn by chance, the more probably the more mass they have, in place of the largest.

Attention restricted to the largest blocks is biased: what lies in the many small ones counts as if
it were like the large ones. Priority sampling (Duffield, Lund and Thorup 2007) is not: every block
has the priority mass / chance, with a chance drawn evenly from (0, 1], and the blocks of largest
priority are read. With the next priority as `threshold`, a block that is read stands for

    weight = max(1, threshold / mass)

blocks of its kind: the expected sum of weight * mass over what is read is the mass of all, block by
block, and no scheme with one block fewer has a smaller variance (Szegedy 2006). A block whose mass
is above the threshold is read for certain and stands for itself alone.

In long rows a coarser stage draws places in the same way, with a seed of its own. A block's mass
times the weight of its place is then what has a priority, and its weight that of its place times
what comes out here: whatever a place is like, on average its blocks stand for all.

A chance is a hash of seed, head, query block and key block: the same on every device, in training
and evaluation, and whenever a layer is computed again.
"""

import torch

from adaptive_longformer.patterns.mixing import mix

# What a layer that draws nothing has in place of a seed.
NO_SEED = -1


def seed_before(seed: int) -> int:
    """That of the coarser stage of a stage."""
    return seed if seed == NO_SEED else (seed + 2**20) % 2**31


def row_words(seed: int, heads: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Words of query blocks by their numbers in the sequence: int64 [heads, rows]."""
    of_head = mix(heads ^ mix(torch.full_like(heads, seed)))
    return mix(of_head[:, None] ^ rows)


def chances(words: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """From 2**-24 to 1, float32, of key blocks for the query blocks that words are of."""
    return ((mix(words ^ mix(blocks)) >> 8) + 1).float() * 2.0**-24


def log_weights(mass: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """What is added to the scores of blocks that are read.

    Args:
        mass: [batch, heads, query_blocks, num_blocks]; 0 beyond the count, which gives 0.
        threshold: [batch, heads, query_blocks]; 0: nothing was left.
    """
    least = torch.finfo(mass.dtype).tiny
    ratio = threshold[..., None].clamp(min=least).log() - mass.clamp(min=least).log()
    return ratio.clamp(min=0.0).masked_fill(mass <= 0, 0.0)
