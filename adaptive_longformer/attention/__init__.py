"""The sparse attention operator, its definition and its backends."""

from adaptive_longformer.attention.call import AttentionSpan, GlobalProjections
from adaptive_longformer.attention.functional import (
    attention_probabilities,
    explain_backends,
    sparse_attention,
)

__all__ = [
    "AttentionSpan",
    "GlobalProjections",
    "attention_probabilities",
    "explain_backends",
    "sparse_attention",
]
