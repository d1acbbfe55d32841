"""Sliding window: every query sees its neighbours."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from adaptive_longformer.patterns.pattern import Pattern, check_whole


@dataclass(frozen=True)
class SlidingWindow(Pattern):
    """Keys from `left` positions before the query to `right` positions after it, the query
    included.

    Args:
        left: keys before the query, in tokens (>= 0).
        right: keys after the query, in tokens (>= 0); the same as `left` if not given.
        dilation: only every `dilation`-th neighbour is seen, so that the window reaches `left *
            dilation` tokens back and `right * dilation` ahead; one number, or one per head.

    Note:
        Both are radii. Longformer's `attention_window=512` is `SlidingWindow(256)`: 513 keys with
        the query itself. Source: Beltagy et al. 2020, section 3.1.
    """

    name: ClassVar[str] = "sliding_window"
    left: int
    right: int = None  # type: ignore[assignment]  # filled in from left
    dilation: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        if self.right is None:
            object.__setattr__(self, "right", self.left)
        check_whole("SlidingWindow", 0, left=self.left, right=self.right)
        if isinstance(self.dilation, tuple):
            if not self.dilation:
                raise ValueError("SlidingWindow: dilation is empty, one number per head is needed")
            for value in self.dilation:
                check_whole("SlidingWindow", 1, dilation=value)
            if len(set(self.dilation)) == 1:
                object.__setattr__(self, "dilation", self.dilation[0])
        else:
            check_whole("SlidingWindow", 1, dilation=self.dilation)
        super().__post_init__()

    def _numbers(self) -> tuple[int, ...]:
        dilation = self.dilation if isinstance(self.dilation, tuple) else (self.dilation,)
        return (self.left, self.right, *dilation)

    @classmethod
    def _of_numbers(cls, *numbers: int) -> "SlidingWindow":
        left, right, *dilation = numbers
        return cls(left, right, tuple(dilation))

    def allowed(self, query_index, key_index, head_index, length):
        offset = key_index - query_index
        if self.dilation == 1:
            return (offset >= -self.left) & (offset <= self.right)
        if isinstance(self.dilation, tuple):
            dilation = torch.tensor(self.dilation, device=offset.device)[head_index]
        else:
            dilation = self.dilation
        near = (offset >= -self.left * dilation) & (offset <= self.right * dilation)
        return near & (offset % dilation == 0)

    @property
    def varies_by_head(self) -> bool:
        return isinstance(self.dilation, tuple)

    @property
    def is_contiguous(self) -> bool:
        """Whether the window has no holes, so that it can be computed as a band."""
        return self.dilation == 1

    def is_within(self, window: "SlidingWindow") -> bool:
        """Whether another window without holes sees all that this one sees."""
        return self.is_contiguous and self.left <= window.left and self.right <= window.right

    @property
    def width(self) -> int:
        """Keys that a query in the middle of a sequence sees, itself included."""
        return self.left + self.right + 1
