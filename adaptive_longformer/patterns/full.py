"""Full attention: every query sees every key."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from adaptive_longformer.patterns.pattern import Pattern


@dataclass(frozen=True)
class Full(Pattern):
    """Every query sees every key; the O(n^2) attention of Vaswani et al. 2017."""

    name: ClassVar[str] = "full"

    def allowed(self, query_index, key_index, head_index, length):
        shape = torch.broadcast_shapes(query_index.shape, key_index.shape)
        return torch.ones(shape, dtype=torch.bool, device=query_index.device)
