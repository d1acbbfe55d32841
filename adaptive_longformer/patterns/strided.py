"""The strided pattern of the Sparse Transformer."""

from dataclasses import dataclass
from typing import ClassVar

from adaptive_longformer.patterns.pattern import Pattern, check_whole


@dataclass(frozen=True)
class Strided(Pattern):
    """The last `stride` tokens and every `stride`-th token before them; mirrored ahead when not
    causal.

    Source: Child et al. 2019, section 4.3 (there causal: combine with `is_causal=True`).

    Note:
        Every query block touches nearly every key block, so block-sparse backends gain little from
        it.
    """

    name: ClassVar[str] = "strided"
    stride: int

    def __post_init__(self) -> None:
        check_whole("Strided", 1, stride=self.stride)
        super().__post_init__()

    def allowed(self, query_index, key_index, head_index, length):
        distance = (query_index - key_index).abs()
        return (distance < self.stride) | (distance % self.stride == 0)
