import pytest
import torch

from adaptive_longformer.attention import sparse_attention
from adaptive_longformer.attention.call import AttentionSpan, make_call
from adaptive_longformer.attention.global_keys import global_keys
from adaptive_longformer.patterns.sliding_window import SlidingWindow
from adaptive_longformer.selection.exportable_selection import (
    BlockBias,
    longest_exportable,
    selecting_attention,
)
from adaptive_longformer.selection.lists import selection_layout
from adaptive_longformer.selection.options import SelectionOptions
from adaptive_longformer.selection.select_blocks import select_blocks

HEADS, HEAD_DIM = 3, 8
WINDOWS = [SlidingWindow(0), SlidingWindow(7, 2), SlidingWindow(20), SlidingWindow(5, 40)]


def drawn(seed, shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_call(number, length, dtype=torch.float64):
    """Query, key and value, and the options of a call; every mask is there in every second."""
    tensors = [
        (drawn(10 * number + i, (2, HEADS, length, HEAD_DIM)) * (1 + number % 3)).to(dtype)
        for i in range(3)
    ]
    mask = is_global = None
    if number % 2:
        mask = torch.ones(2, length, dtype=torch.bool)
        mask[1, length - length // 3 :] = False
        mask[0] = number % 8 != 1  # nothing but padding
    if number // 2 % 2:
        is_global = drawn(number, (2, length)) > 1.5
    span = AttentionSpan(torch.tensor([3.0, 10.0, 50.0], dtype=dtype), 4.0)
    return tensors, {
        "attention_mask": mask,
        "global_mask": None if is_global is None else global_keys(is_global, mask),
        "span": span if number // 4 % 2 else None,
    }


@torch.no_grad()
def both(number, length, options, dtype=torch.float64):
    """What a graph would compute, and the definition of attention to what `select_blocks` chooses
    in float64, without padding.
    """
    window = WINDOWS[number % len(WINDOWS)]
    shape, num_blocks = (HEADS, HEAD_DIM), options.num_blocks
    ranks, directions, of_all = drawn(1, (HEADS, num_blocks)), drawn(2, shape), drawn(3, HEADS)
    limit = torch.tensor([num_blocks, max(num_blocks - 2, 0), 1])
    tensors, given = random_call(number, length, dtype)
    hidden = ranks.masked_fill(torch.arange(num_blocks) >= limit[:, None], -torch.inf)
    bias = BlockBias(hidden)
    if options.num_global_blocks:
        bias = BlockBias(hidden, directions, of_all)
    actual = selecting_attention(make_call(*tensors, window, **given), options, bias)

    tensors = [tensor.double() for tensor in tensors]
    mask, keys = given["attention_mask"], given["global_mask"]
    selected = select_blocks(
        *tensors[:2], window, options, attention_mask=mask,
        global_mask=None if keys is None else keys.mask, global_directions=directions,
    )  # fmt: skip
    layout, slots = selection_layout(selected, window, length, options, limit)
    rows = selected.key_blocks.shape[2]
    shared = (selected.global_means * directions[:, None]).sum(dim=-1) + of_all[:, None]
    window_bias = shared.new_zeros(*shared.shape[:2], 1)
    table = torch.cat([window_bias, ranks.expand(2, -1, -1), shared], dim=-1)[:, :, None]
    table = table.expand(-1, -1, rows, -1).gather(-1, slots)
    if given["span"] is not None:
        given["span"] = given["span"]._replace(length=given["span"].length.double())
    expected = sparse_attention(*tensors, layout, entry_bias=table, backend="reference", **given)
    is_token = 1.0 if mask is None else mask[:, None, :, None]
    return actual * is_token, expected * is_token


SIZES = [
    SelectionOptions(num_blocks=3),
    SelectionOptions(num_blocks=1, block_size=8, query_block_size=64, num_candidates=8),
    SelectionOptions(num_blocks=8, block_size=64, query_block_size=8, num_candidates=50),
    SelectionOptions(num_blocks=4, num_candidates=32, num_global_blocks=2),
    SelectionOptions(num_blocks=100, block_size=32, num_global_blocks=9),
]


@pytest.mark.parametrize("options", SIZES, ids=range(len(SIZES)))
@pytest.mark.parametrize("length", [1, 15, 17, 64, 131])
def test_a_graph_attends_to_what_the_definition_chooses(length, options):
    assert length <= longest_exportable(options)
    for number in range(8):
        actual, expected = both(number, length, options)
        torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 5e-3)], ids=str
)
def test_a_graph_is_as_exact_as_its_type(dtype, tolerance):
    """Of random scores no two masses are so near that float32 takes another block; in float16 it
    is the same, as masses are computed in float32.
    """
    for number in range(8):
        actual, expected = both(number, 131, SelectionOptions(num_blocks=3), dtype)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)


def test_large_scores_stay_finite():
    """exp(1000) is no number; a query whose window has none of its largest keys still sees it."""
    tensors, _ = random_call(2, 131)
    call = make_call(tensors[0] * 100, tensors[1] * 100, tensors[2], SlidingWindow(7))
    hidden = torch.full((HEADS, 3), -torch.inf)
    with torch.no_grad():
        actual = selecting_attention(call, SelectionOptions(num_blocks=3), BlockBias(hidden))
        expected = sparse_attention(
            call.query, call.key, call.value, SlidingWindow(7), backend="reference"
        )
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_the_longest_document_has_one_coarser_stage():
    assert longest_exportable(SelectionOptions()) == 65_536
    assert longest_exportable(SelectionOptions(num_candidates=32)) == 1024
    assert longest_exportable(SelectionOptions(num_candidates=1, block_size=64)) == 128
