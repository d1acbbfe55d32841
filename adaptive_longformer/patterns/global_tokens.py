"""Global tokens: they see every token and every token sees them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from adaptive_longformer.patterns.pattern import Pattern, check_whole


@dataclass(frozen=True)
class GlobalTokens(Pattern):
    """Tokens at fixed positions that see every token and are seen by every token.

    The operator adds them to `global_mask`, so that they are treated like tokens marked there
    (`global_qkv` applies to their rows). Positions beyond the sequence are ignored; negative
    positions are not allowed. Source: Beltagy et al. 2020, section 3.1.
    """

    name: ClassVar[str] = "global_tokens"
    positions: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.positions, Iterable):
            raise ValueError(f"GlobalTokens: positions is {self.positions!r}, a tuple is needed")
        object.__setattr__(self, "positions", tuple(self.positions))
        for value in self.positions:
            check_whole("GlobalTokens", 0, positions=value)
        super().__post_init__()

    def _numbers(self) -> tuple[int, ...]:
        return self.positions

    @classmethod
    def _of_numbers(cls, *numbers: int) -> "GlobalTokens":
        return cls(numbers)

    def mask(self, length: int, device: torch.device) -> torch.Tensor:
        """Boolean tensor [length], True at the global positions."""
        index = torch.arange(length, device=device)
        positions = torch.tensor(self.positions, dtype=index.dtype, device=device)
        return (index[:, None] == positions).any(dim=1)

    def allowed(self, query_index, key_index, head_index, length):
        is_global = self.mask(length, query_index.device)
        return is_global[query_index] | is_global[key_index]
