import functools

import pytest
import torch
from calls import pairwise, readable
from triton_on_cpu import needs_triton

from adaptive_longformer.patterns import SlidingWindow
from adaptive_longformer.selection.lists import selection_layout
from adaptive_longformer.selection.options import SelectionOptions
from adaptive_longformer.selection.select_blocks import SelectedBlocks

pytestmark = needs_triton


@pytest.fixture
def interpreted(triton_interpreter):
    return functools.partial(triton_interpreter, "test_triton_lists", "triton_layout")


def triton_layout(*arguments):
    """What a GPU gets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adaptive_longformer.selection.lists.why_no_triton", lambda device: None)
        return selection_layout(*arguments)


def random_choice(length, query_size, key_size, num_blocks, num_global):
    """Blocks that were chosen from all, which is more than the selection does."""
    generator = torch.Generator().manual_seed(0)
    batch, heads, rows, blocks = 1, 3, -(-length // query_size), -(-length // key_size)
    order = torch.rand(batch, heads, rows, blocks, generator=generator).argsort(dim=-1)
    limit = min(num_blocks, blocks) + 1
    counts = torch.randint(0, limit, (batch, heads, rows), generator=generator)
    key_blocks = torch.zeros(batch, heads, rows, num_blocks, dtype=torch.int32)
    key_blocks[..., :blocks] = order[..., :num_blocks]
    shared = torch.rand(batch, heads, blocks, generator=generator).argsort(dim=-1)
    is_open = torch.rand(batch, heads, rows, num_global, generator=generator) < 0.5
    nothing = torch.zeros(0)
    return SelectedBlocks(
        key_blocks, counts.int(), nothing, nothing, shared[..., :num_global].int(), is_open, nothing
    )


GRID = {
    "window": [SlidingWindow(20), SlidingWindow(30, 0), SlidingWindow(2**31 - 1)],
    "sizes": [(16, 16), (64, 16), (16, 64), (24, 12)],
    "num_global": [0, 2],
    "limits": [False, True],
}


@pytest.mark.parametrize("case", pairwise(GRID), ids=readable)
def test_lists_are_those_of_torch(case, interpreted):
    length, (query_size, key_size) = 100, case["sizes"]
    options = SelectionOptions(3, key_size, query_size)
    selected = random_choice(length, query_size, key_size, 3, case["num_global"])
    arguments = (selected, case["window"], length, options)
    if case["limits"]:
        arguments += (torch.tensor([0, 2, 7]), torch.tensor([0, 7, 20]))
    expected, expected_slots = selection_layout(*arguments)
    actual, slots = interpreted(*arguments)
    for name in ("key_blocks", "counts", "flags"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    assert torch.equal(slots, expected_slots)
