"""The fixed pattern of the Sparse Transformer."""

from dataclasses import dataclass
from typing import ClassVar

from adaptive_longformer.patterns.pattern import Pattern, check_whole


@dataclass(frozen=True)
class Fixed(Pattern):
    """The query's own chunk of `stride` tokens, and the last `summary_size` tokens of every chunk.

    Source: Child et al. 2019, section 4.3 (there causal: combine with `is_causal=True`; `stride` is
    l, `summary_size` is c).
    """

    name: ClassVar[str] = "fixed"
    stride: int
    summary_size: int = 8

    def __post_init__(self) -> None:
        check_whole("Fixed", 1, stride=self.stride, summary_size=self.summary_size)
        if self.summary_size > self.stride:
            raise ValueError(
                f"Fixed: summary_size is {self.summary_size}, at most stride = {self.stride} is "
                "allowed"
            )
        super().__post_init__()

    def allowed(self, query_index, key_index, head_index, length):
        same_chunk = query_index // self.stride == key_index // self.stride
        return same_chunk | (key_index % self.stride >= self.stride - self.summary_size)
