"""Attention patterns: which keys a query may attend to, as rules and as lists of blocks."""

from adaptive_longformer.patterns.big_bird import BigBird, big_bird_layout, random_draw
from adaptive_longformer.patterns.block_layout import (
    BlockLayout,
    EntryFlag,
    TransposedLayout,
    block_layout,
    split_window,
)
from adaptive_longformer.patterns.fixed import Fixed
from adaptive_longformer.patterns.full import Full
from adaptive_longformer.patterns.global_tokens import GlobalTokens
from adaptive_longformer.patterns.pattern import Pattern, Union, pattern_from_code
from adaptive_longformer.patterns.random_blocks import RandomBlocks
from adaptive_longformer.patterns.sliding_window import SlidingWindow
from adaptive_longformer.patterns.strided import Strided

__all__ = [
    "BigBird",
    "BlockLayout",
    "EntryFlag",
    "Fixed",
    "Full",
    "GlobalTokens",
    "Pattern",
    "RandomBlocks",
    "SlidingWindow",
    "Strided",
    "TransposedLayout",
    "Union",
    "big_bird_layout",
    "block_layout",
    "pattern_from_code",
    "random_draw",
    "split_window",
]
