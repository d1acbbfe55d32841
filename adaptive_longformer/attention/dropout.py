"""Dropout masks drawn from coordinates, so that every backend and every recomputation draws the
same one.

The decision for (batch b, head h, query i, key j) is a hash of the seed and these four numbers. It
is split into one word per query row and one per key, which are hashed well once, and a cheap
combination per pair:

    x = row_key[b, h, i] ^ column_key[j]
    x = x * MULTIPLIER_1;  x = x ^ (x >> 15);  x = x * MULTIPLIER_2
    keep iff (x >> 1) >= round(p * 2**31) - 2**30

all in int32, which wraps, with arithmetic shifts.
"""

from typing import Any

import torch

from adaptive_longformer.patterns.mixing import MULTIPLIER_1, MULTIPLIER_2, mix

_GOLDEN = 0x9E3779B1
_MULTIPLIER_2_SIGNED = MULTIPLIER_2 - 2**32


def fresh_dropout(dropout_p: float, device: torch.device) -> dict[str, Any]:
    """The arguments of `sparse_attention` for dropout with a seed that is drawn now.

    It comes from torch's default generator of the device. Called inside a layer, activation
    checkpointing, which restores the generator, draws it again.
    """
    seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    return {"dropout_p": dropout_p, "dropout_seed": seed}


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


def keep_words(rows: torch.Tensor, columns: torch.Tensor, dropout_p: float) -> torch.Tensor:
    """-1 where a pair is kept, 0 where it is dropped: int32 [..., queries, keys].

    Args:
        rows: words of the queries, int32 [..., queries, 1].
        columns: words of the keys, int32 [..., 1, keys].
        dropout_p: probability of a drop, in [0, 1).
    """
    word = rows ^ columns
    word.mul_(MULTIPLIER_1)
    word.bitwise_xor_(word >> 15)
    word.mul_(_MULTIPLIER_2_SIGNED)
    # The sign of the difference, in arithmetic that cannot overflow, is many times faster than a
    # comparison.
    word.bitwise_right_shift_(1)
    word.neg_().add_(threshold(dropout_p) - 1)
    return word.bitwise_right_shift_(31)


def threshold(dropout_p: float) -> int:
    """Words, as signed 31-bit numbers, below this one mean dropped."""
    return round(dropout_p * 2**31) - 2**30


def zero_dropped_(weights: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Sets the dropped weights to zero in place; keep as `keep_words` gives it, of the same
    shape.
    """
    if weights.dtype == torch.float32:
        weights.view(torch.int32).bitwise_and_(keep)
        return weights
    return weights.masked_fill_(keep == 0, 0.0)
