"""What `sparse_attention` refuses, before any backend sees it."""

from dataclasses import replace

import pytest
import torch

from adaptive_longformer.attention import AttentionSpan, sparse_attention
from adaptive_longformer.patterns import (
    BigBird,
    BlockLayout,
    EntryFlag,
    SlidingWindow,
    block_layout,
)
from adaptive_longformer.patterns.big_bird import big_bird_layout
from adaptive_longformer.patterns.block_layout import window_layout
from adaptive_longformer.selection.lists import selection_layout
from adaptive_longformer.selection.options import SelectionOptions
from adaptive_longformer.selection.select_blocks import select_blocks


@pytest.fixture
def validated(monkeypatch):
    """The layouts that were validated, in order."""
    seen, original = [], BlockLayout.validate

    def validate(layout):
        seen.append(layout)
        original(layout)

    monkeypatch.setattr(BlockLayout, "validate", validate)
    return seen


def routed_layout(length=64):
    """Every block of 16 reads itself and the next two."""
    num_blocks = length // 16
    block = torch.arange(num_blocks)[:, None]
    key_blocks = ((block + torch.arange(3)) % num_blocks).int()[None, None]
    return BlockLayout(
        key_blocks=key_blocks,
        counts=torch.full(key_blocks.shape[:3], 3, dtype=torch.int32),
        flags=torch.full_like(key_blocks, int(EntryFlag.SELECTED | EntryFlag.FULL)),
        query_block_size=16,
        key_block_size=16,
        length=length,
    )


def attend(layout, backend="blocked"):
    query = torch.randn(1, 2, layout.length, 8)
    return sparse_attention(query, query, query, layout, backend=backend)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda blocks: blocks + 2, "ids from 2 to 5, 0 to 3 is allowed"),
        (lambda blocks: blocks - 1, "ids from -1"),
        (lambda blocks: blocks.clamp(max=0), "lists a block twice"),
    ],
    ids=["too_large", "negative", "duplicate"],
)
@pytest.mark.parametrize("backend", ["auto", "blocked", "reference"])
def test_a_wrong_list_is_an_error_of_every_backend(backend, change, message):
    layout = routed_layout()
    wrong = replace(layout, key_blocks=change(layout.key_blocks))
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            attend(wrong, backend)


@pytest.mark.parametrize("backend", ["auto", "blocked", "reference"])
def test_a_list_without_a_block_of_its_window_is_an_error_of_every_backend(backend):
    layout = block_layout(SlidingWindow(20), 128, query_block_size=16, key_block_size=32)
    assert attend(layout.select(layout.used), backend).isfinite().all()
    with pytest.raises(ValueError, match="lacks WINDOW entries"):
        attend(layout.select(layout.key_blocks != 1), backend)


def test_a_right_list_is_checked_once(validated):
    layout = routed_layout()
    attend(layout)
    attend(layout)
    assert validated == [layout]
    with pytest.raises(ValueError, match="ids from"):
        attend(replace(layout, key_blocks=layout.key_blocks + 1))
    assert len(validated) == 2


def test_lists_of_this_package_are_never_checked(validated):
    attend(block_layout(SlidingWindow(8), 70))
    attend(big_bird_layout(BigBird(8, 1), 70))
    attend(window_layout(SlidingWindow(8), 70, torch.tensor([8, 3])))
    query = torch.randn(1, 2, 70, 8)
    options = SelectionOptions(2, 8, 8)
    selected = select_blocks(query, query, SlidingWindow(8), options)
    attend(selection_layout(selected, SlidingWindow(8), 70, options)[0])
    assert validated == []


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_more_rows_than_32_bits_can_count_are_refused_without_memory(backend):
    query = torch.zeros(1).expand(2**11, 2**10, 2**10, 8)
    with pytest.raises(ValueError, match=r"length = 2147483648, less than 2\*\*31 is allowed"):
        sparse_attention(query, query, query, SlidingWindow(2), backend=backend)


def test_no_head_dim_is_refused():
    query = torch.zeros(1, 2, 10, 0)
    with pytest.raises(ValueError, match="head_dim of 1 or more"):
        sparse_attention(query, query, query, SlidingWindow(2))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"pattern_or_layout": routed_layout()}, "layout.key_blocks is on cpu"),
        ({"entry_bias": torch.zeros(1, 1, 4, 3)}, "entry_bias is on cpu"),
        ({"span": AttentionSpan(torch.ones(2), 2.0)}, "span.length is on cpu"),
        ({"attention_mask": torch.ones(1, 64, dtype=torch.bool)}, "attention_mask has shape"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensors_on_two_devices_are_named(change, name):
    query = torch.zeros(1, 2, 64, 8, device="meta")
    layout = routed_layout()
    on_device = replace(
        layout,
        key_blocks=layout.key_blocks.to("meta"),
        counts=layout.counts.to("meta"),
        flags=layout.flags.to("meta"),
        window=SlidingWindow(4),
    )
    arguments = {"pattern_or_layout": on_device, **change}
    with pytest.raises(ValueError, match=name):
        sparse_attention(query, query, query, **arguments)


def test_forward_mode_derivatives_are_right_or_refused():
    query, key, value, direction = torch.randn(4, 1, 2, 20, 8, dtype=torch.float64).unbind()

    def attend(query, backend="auto"):
        return sparse_attention(query, key, value, SlidingWindow(3), backend=backend)

    _, found = torch.func.jvp(attend, (query,), (direction,))
    step = 1e-6 * direction
    expected = (attend(query + step) - attend(query - step)) / 2e-6
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-6)
    with pytest.raises(ValueError, match="'blocked' has no forward-mode derivatives, 'reference'"):
        torch.func.jvp(lambda query: attend(query, "blocked"), (query,), (direction,))
