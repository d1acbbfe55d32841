"""The integer hash behind random blocks and dropout masks."""

import torch

MULTIPLIER_1 = 0x7FEB352D
MULTIPLIER_2 = 0x846CA68B
_LOW_32 = 0xFFFFFFFF


def mix(value: torch.Tensor) -> torch.Tensor:
    """Hashes the low 32 bits of each int64 to 32 uniform bits, returned as int64 in [0, 2**32).

    A 32-bit finaliser (xor-shift, multiply) with the constants published by C. Wellons for
    hash-prospector.
    A pure function of its input: equal on every device.
    """
    value = value & _LOW_32
    value = ((value ^ (value >> 16)) * MULTIPLIER_1) & _LOW_32
    value = ((value ^ (value >> 15)) * MULTIPLIER_2) & _LOW_32
    return value ^ (value >> 16)
