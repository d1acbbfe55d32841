import pytest
import torch

from adaptive_longformer.attention.functional import attention_probabilities, sparse_attention
from adaptive_longformer.patterns.sliding_window import SlidingWindow
from adaptive_longformer.selection.coarse_tail import (
    CoarseTail,
    add_coarse_tail,
    coarse_tail,
    coarse_tail_nodes,
    coarse_tail_probabilities,
    summary_keys,
)
from adaptive_longformer.selection.select_blocks import (
    RoutingOptions,
    select_blocks,
    selection_layout,
)

WINDOW = SlidingWindow(20)
RANK_LIMIT = torch.tensor([3, 1])
HEAD_BIAS = (-0.7, 0.0)


def problem(length, *, is_masked=False, head_bias=HEAD_BIAS, **options):
    """Tensors, masks, a layout with 3 chosen blocks and one for all queries, and the tail."""
    generator = torch.Generator().manual_seed(length)
    query, key, value, direction = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in [(2, 2, length, 8)] * 3 + [(2, 8)]
    )
    masks = {"attention_mask": None, "global_mask": None}
    if is_masked:
        attention_mask = torch.ones(2, length, dtype=torch.bool)
        attention_mask[0, length // 2 : length // 2 + 37] = False  # a block of 16 is all padding
        attention_mask[1, length - length // 3 :] = False
        global_mask = torch.zeros(2, length, dtype=torch.bool)
        global_mask[:, [0, 70]] = True
        masks = {"attention_mask": attention_mask, "global_mask": global_mask}
        # Whatever padding holds, nothing of it may be read.
        key[1, :, -1], value[1, :, -1], query[1, :, -1] = torch.nan, torch.inf, torch.nan
    routing = RoutingOptions(3, 16, num_global_blocks=1, **{"query_block_size": 16, **options})
    selected = select_blocks(query, key, WINDOW, routing, global_directions=direction, **masks)
    layout, _ = selection_layout(selected, WINDOW, length, routing, RANK_LIMIT)
    tail = CoarseTail(
        coarse_tail_nodes(
            selected, WINDOW, length, routing, rank_limit=RANK_LIMIT,
            attention_mask=masks["attention_mask"],
        ),
        torch.tensor(head_bias, dtype=torch.float64),
        routing.block_size,
        routing.query_block_size,
        routing.start_level(-(-length // 16)),
    )  # fmt: skip
    return (query, key, value), masks, layout, tail, selected, routing


def named_blocks(selected, routing, length, batch, head, row):
    """The blocks that the window touches or that were chosen, one pair of tokens at a time."""
    size = routing.query_block_size
    tokens = range(row * size, min((row + 1) * size, length))
    named = {j // 16 for i in tokens for j in range(max(0, i - 20), min(length, i + 21))}
    count = min(int(selected.counts[batch, head, row]), int(RANK_LIMIT[head]))
    named |= set(selected.key_blocks[batch, head, row, :count].tolist())
    if selected.global_open[batch, head, row, 0]:
        named.add(int(selected.global_blocks[batch, head, 0]))
    return named


def cut(named, num_blocks, start_nodes):
    """Runs of blocks without a named one, as long as the level the search starts from allows."""
    span = 1
    while -(-num_blocks // span) > start_nodes:
        span *= 4

    def runs(first, span):
        blocks = range(first, min(first + span, num_blocks))
        if not blocks:
            return []
        if not named & set(blocks):
            return [blocks]
        if span == 1:
            return []
        return [run for child in range(4) for run in runs(first + child * span // 4, span // 4)]

    return [run for first in range(0, num_blocks, span) for run in runs(first, span)]


def oracle(tensors, masks, layout, selected, routing, head_bias):
    """One softmax over the tokens that the lists show and the summary keys; their number too."""
    query, key, value = tensors
    batch, heads, length, head_dim = query.shape
    valid = masks["attention_mask"]
    valid = torch.ones(batch, length, dtype=torch.bool) if valid is None else valid
    is_global = masks["global_mask"]
    is_global = ~valid & False if is_global is None else is_global & valid
    position = torch.arange(length)
    visible = (
        attention_probabilities(torch.zeros_like(query), torch.zeros_like(key), layout, **masks) > 0
    )
    key, value = (t.masked_fill(~valid[:, None, :, None], 0.0) for t in (key, value))
    query = query.masked_fill(~valid[:, None, :, None], 0.0)
    outputs, widths = torch.zeros_like(query), torch.zeros(batch, heads, length)
    for b in range(batch):
        own = int(valid[b].nonzero().max()) + 1
        for h in range(heads):
            for row in range(-(-length // routing.query_block_size)):
                named = named_blocks(selected, routing, length, b, h, row)
                keys, values, biases = [], [], []
                for run in cut(named, -(-own // 16), routing.start_nodes):
                    inside = (valid & ~is_global)[b] & (position >= run[0] * 16)
                    inside = inside & (position < (run[-1] + 1) * 16)
                    if inside.any():
                        keys.append(key[b, h, inside].mean(dim=0))
                        values.append(value[b, h, inside].mean(dim=0))
                        biases.append(inside.sum().double().log() + head_bias[h])
                first = row * routing.query_block_size
                for i in range(first, min(first + routing.query_block_size, length)):
                    shown = visible[b, h, i]
                    scores = key[b, h, shown] @ query[b, h, i] * head_dim**-0.5
                    read = value[b, h, shown]
                    if keys and not is_global[b, i] and head_bias[h] > -torch.inf:
                        coarse = torch.stack(keys) @ query[b, h, i] * head_dim**-0.5
                        scores = torch.cat([scores, coarse + torch.stack(biases)])
                        read = torch.cat([read, torch.stack(values)])
                        widths[b, h, i] = len(keys)
                    outputs[b, h, i] = scores.softmax(dim=0) @ read
    return outputs, widths


def attend(tensors, masks, layout, tail, backend="blocked", **dropout):
    output, lse = sparse_attention(
        *tensors, layout, return_lse=True, backend=backend, **masks, **dropout
    )
    return add_coarse_tail(output, lse, *tensors, tail, **masks, **dropout)


CASES = pytest.mark.parametrize(
    ("length", "is_masked", "options"),
    [
        (203, False, {}),
        (330, True, {}),
        (330, True, {"start_nodes": 3, "beam_width": 2}),
        (400, False, {"start_nodes": 2, "beam_width": 3, "query_block_size": 32}),
        (400, True, {"start_nodes": 10, "beam_width": 3, "query_block_size": 64}),
    ],
)


@CASES
def test_output_and_gradients_are_those_of_one_softmax_over_tokens_and_summaries(
    length, is_masked, options
):
    tensors, masks, layout, tail, selected, routing = problem(
        length, is_masked=is_masked, **options
    )
    tensors = [tensor.requires_grad_() for tensor in tensors]
    head_bias = tail.head_bias.requires_grad_()
    expected, widths = oracle(tensors, masks, layout, selected, routing, head_bias)
    actual, share = attend(tensors, masks, layout, tail)
    keep = torch.ones(2, length, dtype=torch.bool)
    if is_masked:
        keep = masks["attention_mask"]
    where = keep[:, None, :, None].expand_as(actual)
    torch.testing.assert_close(actual[where], expected[where])
    assert (widths[0] > 0).any() and ((share > 0) == (widths > 0)).transpose(1, 2)[keep].all()
    weight = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
    leaves = [*tensors, head_bias]
    found = torch.autograd.grad((actual * weight)[where].sum(), leaves)
    wanted = torch.autograd.grad((expected * weight)[where].sum(), leaves)
    for first, second in zip(found, wanted, strict=True):
        torch.testing.assert_close(first, second)


@CASES
def test_every_key_that_no_list_names_is_in_exactly_one_node(length, is_masked, options):
    tensors, masks, _, tail, selected, routing = problem(length, is_masked=is_masked, **options)
    tail = tail._replace(head_bias=torch.zeros(2))
    # With queries of 0 a node weighs as much as it has keys.
    nothing = torch.zeros_like(tensors[0])
    dense = coarse_tail_probabilities(nothing, tensors[1], tail, **masks)
    ordinary = torch.ones(2, length, dtype=torch.bool)
    if is_masked:
        ordinary = masks["attention_mask"] & ~masks["global_mask"]
    block = torch.arange(length) // 16
    for batch in range(2):
        for head in range(2):
            for row in range(0, -(-length // routing.query_block_size), 3):
                named = named_blocks(selected, routing, length, batch, head, row)
                is_named = torch.tensor([int(b) in named for b in block])
                expected = (ordinary[batch] & ~is_named).double()
                expected = expected / expected.sum().clamp(min=1)
                actual = dense[batch, head, row * routing.query_block_size]
                torch.testing.assert_close(actual, expected)


def test_the_dense_weights_of_the_tail_give_its_output():
    tensors, masks, layout, tail, *_ = problem(330, is_masked=True, start_nodes=3, beam_width=2)
    valid = masks["attention_mask"]
    output, share = attend(tensors, masks, layout, tail)
    query, key, value = (t.masked_fill(~valid[:, None, :, None], 0.0) for t in tensors)
    fine = attention_probabilities(query, key, layout, **masks)
    coarse = coarse_tail_probabilities(query, key, tail, **masks)
    weights = torch.lerp(fine, coarse, share[..., None])
    where = valid[:, None, :, None].expand_as(output)
    torch.testing.assert_close((weights @ value)[where], output[where])
    sums = weights.sum(dim=-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))


def test_a_head_without_a_tail_keeps_its_output_bit_for_bit():
    tensors, masks, layout, tail, *_ = problem(203, head_bias=(-torch.inf, 0.0))
    plain = sparse_attention(*tensors, layout, backend="blocked", **masks)
    output, share = attend(tensors, masks, layout, tail)
    assert torch.equal(output[:, 0], plain[:, 0]) and not share[:, 0].any()
    assert not torch.equal(output[:, 1], plain[:, 1])
    assert not summary_keys(tail, 203)[:, 0].any()


@pytest.mark.parametrize("amount", [1, 16, 300])
@pytest.mark.parametrize("start_nodes", [256, 3])
def test_padding_changes_nothing(amount, start_nodes):
    options = {"start_nodes": start_nodes, "beam_width": 2, "query_block_size": 16}
    routing = RoutingOptions(3, 16, **options)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 2, 203, 8, generator=generator).double() for _ in "qkv"]
    padded = [torch.nn.functional.pad(t, (0, 0, 0, amount), value=9.0) for t in tensors]
    results = []
    for inputs in (tensors, padded):
        length = inputs[0].shape[2]
        mask = torch.arange(length)[None] < 203
        selected = select_blocks(*inputs[:2], WINDOW, routing, attention_mask=mask)
        layout, _ = selection_layout(selected, WINDOW, length, routing)
        nodes = coarse_tail_nodes(selected, WINDOW, length, routing, attention_mask=mask)
        levels = routing.start_level(-(-length // 16))
        tail = CoarseTail(nodes, torch.zeros(2), 16, 16, levels)
        masks = {"attention_mask": mask}
        output, _ = attend(inputs, masks, layout, tail)
        widths = summary_keys(tail, length, **masks)
        results.append((output[:, :, :203], widths[:, :, : -(-203 // 16)]))
    torch.testing.assert_close(results[1][0], results[0][0])
    assert torch.equal(results[1][1], results[0][1]) and results[0][1].min() > 0


def operator_arguments(dropout_p, requires_grad=True):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 2, 22, 3), (1, 2, 7, 3), (1, 2, 7, 3), (1, 2, 7)]
    leaves = [torch.randn(*shape, generator=generator).double() for shape in shapes]
    leaves[3][0, 1, 2] = -torch.inf
    nodes = torch.stack([torch.randperm(8, generator=generator)[:4] for _ in range(6)])
    nodes = nodes.view(1, 2, 3, 4)
    nodes[0, 0, 1] = 7  # nothing but filling
    for leaf in leaves:
        leaf.requires_grad_(requires_grad)
    return leaves, (nodes, 8, 0.6, dropout_p, torch.tensor(3) if dropout_p else None)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_the_operator_passes_gradcheck_and_opcheck(dropout_p):
    leaves, rest = operator_arguments(dropout_p)

    def attend_tail(query, key, value, bias):
        output, lse = coarse_tail(query, key, value, bias, *rest)
        return output, lse.masked_fill(lse == -torch.inf, 0.0)

    finite = leaves[3].detach().clamp(min=-1.0).requires_grad_()
    assert torch.autograd.gradcheck(attend_tail, (*leaves[:3], finite))
    if dropout_p:
        torch.library.opcheck(coarse_tail, (*leaves, *rest))


def test_dropout_is_drawn_from_the_seed_and_keeps_the_mean():
    leaves, (nodes, size, scale, _, _) = operator_arguments(0.0, requires_grad=False)
    expected, lse = coarse_tail(*leaves, nodes, size, scale, 0.0, None)
    drawn = [
        coarse_tail(*leaves, nodes, size, scale, 0.5, torch.tensor(seed)) for seed in range(500)
    ]
    assert torch.equal(drawn[0][1], lse)
    again, _ = coarse_tail(*leaves, nodes, size, scale, 0.5, torch.tensor(7))
    assert torch.equal(again, drawn[7][0]) and not torch.equal(again, drawn[8][0])
    outputs = torch.stack([output for output, _ in drawn])
    error = outputs.std(dim=0) / 500**0.5
    assert ((outputs.mean(dim=0) - expected).abs() <= 5 * error + 1e-12).all()


def test_the_tail_grows_with_the_length_only_by_its_width():
    """Lists hold at most the nodes that a search starts from, and four children per named block
    and level below.
    """
    routing = RoutingOptions(3, 16, 16, start_nodes=8, beam_width=4)
    widths = []
    for length in (2048, 8192):
        query, key = torch.randn(2, 1, 1, length, 4)
        selected = select_blocks(query, key, WINDOW, routing)
        nodes = coarse_tail_nodes(selected, WINDOW, length, routing)
        levels = routing.start_level(length // 16)
        named = 5 + 3  # blocks that a window touches, and chosen ones
        assert nodes.shape[-1] <= 8 + 4 * named * (levels - 1)
        widths.append(nodes.shape[-1])
    assert widths[1] - widths[0] == 4 * 8
