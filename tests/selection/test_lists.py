import pytest
import torch
from selection_calls import SMALL, chosen, masks_of, random_keys

from adaptive_longformer.attention.call import AttentionSpan
from adaptive_longformer.attention.functional import sparse_attention
from adaptive_longformer.patterns import EntryFlag, SlidingWindow
from adaptive_longformer.selection.lists import selection_layout
from adaptive_longformer.selection.select_blocks import select_blocks


def test_rank_limit_shortens_the_lists():
    query, key = random_keys(400, batch=1)
    selected = select_blocks(query, key, SlidingWindow(20), SMALL)
    layout, slots = selection_layout(selected, SlidingWindow(20), 400, SMALL, torch.tensor([0, 2]))
    layout.validate()
    assert (slots[0, 0] == 0).all()
    assert slots[0, 1].max() == 2


def test_window_entries_beyond_the_reach_of_a_head_leave_the_list():
    length, window, reach = 400, SlidingWindow(50), torch.tensor([7, 50])
    query, key = random_keys(length, batch=1)
    value = torch.randn(1, 2, length, 8, dtype=torch.float64)
    selected = select_blocks(query, key, window, SMALL)
    whole, whole_slots = selection_layout(selected, window, length, SMALL)
    layout, slots = selection_layout(selected, window, length, SMALL, reach=reach)
    layout.validate()
    assert torch.equal(layout.key_blocks[:, 1], whole.key_blocks[:, 1])
    near = [((lists.flags & EntryFlag.WINDOW) != 0).sum(dim=-1)[0, 0] for lists in (layout, whole)]
    assert near[0].tolist() == [2] + [3] * 23 + [2] and (near[1] > 4).all()
    for row in range(25):
        chosen_slots = [s[0, 0, row][s[0, 0, row] > 0].tolist() for s in (slots, whole_slots)]
        assert chosen_slots[0] == chosen_slots[1]
    span = AttentionSpan(reach + 1.0 - 5.0, 5.0)  # the ramp ends where the reach does
    expected = sparse_attention(query, key, value, whole, span=span, backend="reference")
    for backend in ("reference", "blocked"):
        actual = sparse_attention(query, key, value, layout, span=span, backend=backend)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", ["none", "both"])
def test_attention_is_one_softmax_over_window_globals_and_chosen_blocks(kind, is_causal):
    length, radius = 331, 20
    query, key = random_keys(length)
    value = torch.randn(2, 2, length, 8, dtype=torch.float64)
    mask, is_global = masks_of(kind, 2, length)
    where = {"attention_mask": mask, "global_mask": is_global, "is_causal": is_causal}
    selected = select_blocks(query, key, SlidingWindow(radius), SMALL, **where)
    layout, _ = selection_layout(selected, SlidingWindow(radius), length, SMALL)
    layout.validate()
    position = torch.arange(length)
    visible = ((position[:, None] - position).abs() <= radius).repeat(2, 2, 1, 1)
    for batch in range(2):
        for head in range(2):
            for row in range(selected.counts.shape[2]):
                for block in chosen(selected, batch, head, row):
                    rows = slice(row * 16, row * 16 + 16)
                    visible[batch, head, rows, block * 16 : block * 16 + 16] = True
    if is_global is not None:
        real_global = is_global & mask
        visible |= real_global[:, None, None] | real_global[:, None, :, None]
    if mask is not None:
        visible &= mask[:, None, None]
    if is_causal:
        visible &= position <= position[:, None]
    scores = (query @ key.mT / 8**0.5).masked_fill(~visible, -torch.inf)
    expected = scores.softmax(dim=-1).nan_to_num() @ value
    for backend in ("blocked", "reference"):
        actual = sparse_attention(query, key, value, layout, backend=backend, **where)
        torch.testing.assert_close(actual, expected)
