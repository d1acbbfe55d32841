"""How many kernels a choice of blocks launches on a GPU, and that it never waits for the device."""

import pytest
import torch
from launches import launches
from triton_on_cpu import needs_triton

from adaptive_longformer.patterns import SlidingWindow
from adaptive_longformer.selection.lists import selection_layout
from adaptive_longformer.selection.options import SelectionOptions
from adaptive_longformer.selection.select_blocks import select_blocks

pytestmark = needs_triton

# Length, whether there are masks, whether causal, and launches: two stages beyond 4,096 tokens.
CASES = [
    (4096, False, False, 4),
    (4096, True, False, 5),
    (4096, True, True, 5),
    (16384, False, False, 9),
    (16384, True, False, 18),
    (16384, True, True, 17),
]


@pytest.mark.parametrize("length, has_masks, is_causal, most", CASES)
def test_choosing_and_listing_take_few_launches(length, has_masks, is_causal, most):
    options = SelectionOptions()
    window = SlidingWindow(256, 0 if is_causal else 256)
    with launches() as counts:
        query, key = torch.empty(2, 2, 12, length, 64, dtype=torch.bfloat16, device="meta")
        where = {}
        if has_masks:
            mask = torch.empty(2, length, dtype=torch.bool, device="meta")
            where = {"attention_mask": mask, "global_mask": mask, "max_global_tokens": 16}
        limit = torch.empty(12, dtype=torch.int64, device="meta")
        selected = select_blocks(query, key, window, options, is_causal=is_causal, **where)
        selection_layout(selected, window, length, options, limit)
    assert counts.total() <= most, counts
    assert counts["masses_kernel"] == (2 if length > 4096 else 1)


def test_what_waits_for_the_device_is_found():
    with launches(), pytest.raises(RuntimeError, match="meta"):
        torch.empty(3, device="meta").sum().item()
    mask = torch.empty(1, 64, dtype=torch.bool, device="meta")
    query, key = torch.empty(2, 1, 1, 64, 16, device="meta")
    with launches(), pytest.raises(RuntimeError, match="meta"):
        select_blocks(query, key, SlidingWindow(8), SelectionOptions(), global_mask=mask)
