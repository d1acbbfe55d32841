from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_longformer.patterns import (
    EntryFlag,
    Fixed,
    Full,
    GlobalTokens,
    RandomBlocks,
    SlidingWindow,
    Strided,
    block_layout,
)
from adaptive_longformer.patterns.block_layout import window_layout

patterns = st.sampled_from(
    [
        SlidingWindow(0),
        SlidingWindow(5),
        SlidingWindow(3, 17),
        SlidingWindow(3, dilation=(1, 4)),
        Strided(12),
        Fixed(16, 2),
        RandomBlocks(2, 16),
        RandomBlocks(1, 8) | SlidingWindow(6),
        Strided(12) | SlidingWindow(6) | GlobalTokens((0,)),
        Full(),
    ]
)
block_sizes = st.sampled_from([8, 16, 32])


def visible_through(layout, heads):
    """The pairs a layout lets through, counted, by the words of its docstring."""
    length = layout.length
    position = torch.arange(length)
    counted = torch.zeros(heads, length, length, dtype=torch.int64)
    for head in range(heads):
        lists = layout.key_blocks[0, head % layout.key_blocks.shape[1]]
        flags = layout.flags[0, head % layout.key_blocks.shape[1]]
        counts = layout.counts[0, head % layout.key_blocks.shape[1]]
        for block in range(layout.num_query_blocks):
            query = position[block * layout.query_block_size :][: layout.query_block_size]
            for entry in range(int(counts[block])):
                key = position[int(lists[block, entry]) * layout.key_block_size :]
                key = key[: layout.key_block_size]
                args = (query[:, None], key, torch.tensor(head), length)
                inside = torch.zeros(len(query), len(key), dtype=torch.bool)
                if layout.window is not None:
                    inside = layout.window.allowed(*args)
                flag = int(flags[block, entry])
                mask = inside if flag & EntryFlag.WINDOW else ~inside
                if flag & EntryFlag.PATTERN:
                    mask = mask & layout.pattern.allowed(*args)
                if flag & EntryFlag.FULL:
                    assert mask.all(), "FULL on a tile that is not"
                counted[head, query[:, None], key] += mask
    return counted


@settings(max_examples=60, deadline=None)
@given(patterns, st.integers(1, 90), block_sizes, block_sizes)
def test_layout_lets_exactly_the_patterns_pairs_through_once(pattern, length, q_size, k_size):
    heads = 2
    layout = block_layout(
        pattern, length, query_block_size=q_size, key_block_size=k_size, num_heads=heads
    )
    layout.validate()
    position = torch.arange(length)
    expected = torch.zeros(heads, length, length, dtype=torch.bool)
    for part in pattern.parts:
        if not isinstance(part, GlobalTokens):
            head = torch.arange(heads)[:, None, None]
            expected |= part.allowed(position[:, None], position, head, length)
    assert torch.equal(visible_through(layout, heads), expected.long())


@settings(max_examples=60, deadline=None)
@given(patterns, st.integers(1, 200), block_sizes, block_sizes)
def test_transpose_lists_every_used_entry_under_its_key_block(pattern, length, q_size, k_size):
    layout = block_layout(
        pattern, length, query_block_size=q_size, key_block_size=k_size, num_heads=2
    )
    transposed = layout.transpose()
    starts = transposed.starts.tolist()
    used = layout.used.flatten()
    assert starts[0] == 0
    assert starts[-1] == int(used.sum())
    shape = layout.key_blocks.shape
    blocks = layout.key_blocks.flatten()
    seen = []
    for row in range(shape[0] * shape[1]):
        for key_block in range(layout.num_key_blocks):
            at = row * layout.num_key_blocks + key_block
            members = slice(starts[at], starts[at + 1])
            queries = transposed.query_blocks[members].tolist()
            entries = transposed.entries[members].tolist()
            assert queries == sorted(queries)
            for query_block, entry in zip(queries, entries, strict=True):
                assert bool(used[entry])
                assert int(blocks[entry]) == key_block
                assert entry // shape[3] == row * shape[2] + query_block
                seen.append(entry)
    assert sorted(seen) == used.nonzero().flatten().tolist()


def test_layout_of_a_window_by_hand():
    layout = block_layout(SlidingWindow(8), 40, query_block_size=8, key_block_size=8)
    used = [
        row[:count].tolist()
        for row, count in zip(layout.key_blocks[0, 0], layout.counts[0, 0], strict=True)
    ]
    assert used == [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4]]
    full = ((layout.flags & EntryFlag.FULL) != 0)[0, 0] & layout.used[0, 0]
    assert full.sum() == 5, "only the diagonal tiles lie wholly inside a window of one block"


def test_layouts_are_cached():
    assert block_layout(SlidingWindow(8), 40) is block_layout(SlidingWindow(8), 40)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {"key_blocks": x.key_blocks + 100}, "ids from 100"),
        (lambda x: {"key_blocks": x.key_blocks - 1}, "ids from -1"),
        (lambda x: {"counts": x.counts + 10}, "counts go from"),
        (lambda x: {"key_blocks": x.key_blocks.clamp(max=0)}, "lists a block twice"),
        (lambda x: {"flags": x.flags[:, :, :1]}, "flags has shape"),
        (lambda x: {"window": None}, "flags has WINDOW entries and window is None"),
        (lambda x: {"flags": x.flags | EntryFlag.PATTERN}, "flags has PATTERN entries"),
        (lambda x: {"query_block_size": 4}, "query_block_size is 4"),
        (lambda x: {"length": 400}, "key_blocks has shape"),
    ],
)
def test_a_layout_made_wrong_by_hand_is_refused(change, message):
    layout = block_layout(SlidingWindow(16), 128, query_block_size=16, key_block_size=16)
    layout.validate()
    with pytest.raises(ValueError, match=message):
        replace(layout, **change(layout)).validate()


@pytest.mark.parametrize("sizes", [(16, 16), (16, 64), (64, 16)])
def test_a_head_that_sees_less_of_the_window_has_a_shorter_list(sizes):
    query_size, key_size = sizes
    window, length, reach = SlidingWindow(40, 30), 301, torch.tensor([0, 9, 35, 40])
    layout = window_layout(
        window, length, reach, query_block_size=query_size, key_block_size=key_size
    )
    layout.validate()
    position = torch.arange(length)
    offset = position - position[:, None]
    seen = (offset.abs() <= reach[:, None, None]) & (offset <= 30)
    counted = visible_through(layout, 4)
    assert counted.max() == 1 and (counted[seen] == 1).all()
    for head in range(4):
        for row in range(layout.num_query_blocks):
            keys = seen[head, row * query_size : (row + 1) * query_size].any(dim=0).nonzero()
            listed = layout.key_blocks[0, head, row, : layout.counts[0, head, row]]
            assert listed.tolist() == (keys.flatten() // key_size).unique().tolist()
    whole = block_layout(window, length, query_block_size=query_size, key_block_size=key_size)
    assert torch.equal(layout.counts[0, 3], whole.counts[0, 0])


def test_the_default_device_is_not_asked():
    pattern = SlidingWindow(30)
    with torch.device("meta"):
        layout = block_layout(pattern, 321)
    assert layout.key_blocks.device.type == layout.counts.device.type == "cpu"
    assert layout.counts.sum() > 0


@pytest.mark.parametrize("pattern", [SlidingWindow(3), Strided(4), SlidingWindow(3) | Strided(4)])
def test_no_tokens_have_no_lists(pattern):
    layout = block_layout(pattern, 0)
    layout.validate()
    assert layout.key_blocks.numel() == layout.counts.numel() == 0
