"""Dropout masks drawn from coordinates, so that every backend and every recomputation draws the same one.

The decision for (batch b, head h, query i, key j) is a hash of the seed and these four numbers. It is split into
one word per query row and one per key, which are hashed well once, and a cheap combination per pair:

    x = row_key[b, h, i] ^ column_key[j]
    x = x * MULTIPLIER_1;  x = x ^ (x >> 15);  x = x * MULTIPLIER_2          (int32, wrapping, arithmetic shift)
    keep iff x >= round(p * 2**32) - 2**31                                    (signed comparison)
"""

import torch

from adaptive_longformer.patterns.mixing import MULTIPLIER_1, MULTIPLIER_2, mix

_GOLDEN = 0x9E3779B1
_MULTIPLIER_2_SIGNED = MULTIPLIER_2 - 2**32


def row_keys(seed: torch.Tensor, batch: int, heads: int, length: int) -> torch.Tensor:
    """One word per query row: int32 [batch, heads, length]. `seed` is an int64 scalar tensor."""
    stream = torch.arange(batch * heads, device=seed.device).view(batch, heads, 1)
    first = mix(seed + stream * _GOLDEN)
    second = mix((seed >> 32) ^ first)
    return mix(mix(torch.arange(length, device=seed.device) + first) ^ second).to(torch.int32)


def column_keys(seed: torch.Tensor, length: int) -> torch.Tensor:
    """One word per key: int32 [length]."""
    first = mix(seed ^ _GOLDEN)
    second = mix((seed >> 32) + first)
    return mix(mix(torch.arange(length, device=seed.device) + first) ^ second).to(torch.int32)


def dropped(rows: torch.Tensor, columns: torch.Tensor, dropout_p: float) -> torch.Tensor:
    """Which pairs are dropped: bool [..., queries, keys] from rows [..., queries, 1] and columns [..., 1, keys]."""
    word = rows ^ columns
    word.mul_(MULTIPLIER_1)
    word.bitwise_xor_(word >> 15)
    word.mul_(_MULTIPLIER_2_SIGNED)
    return word < threshold(dropout_p)


def threshold(dropout_p: float) -> int:
    """The int32 below which a word means dropped."""
    return min(round(dropout_p * 2**32) - 2**31, 2**31 - 1)
