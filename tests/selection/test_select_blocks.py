import itertools
from dataclasses import replace

import pytest
import torch
from calls import skip_without_cpp_compiler

from adaptive_longformer.attention.call import AttentionSpan
from adaptive_longformer.attention.functional import sparse_attention
from adaptive_longformer.patterns import EntryFlag, SlidingWindow
from adaptive_longformer.selection import select_blocks as selection
from adaptive_longformer.selection import vote as voting
from adaptive_longformer.selection.lists import selection_layout
from adaptive_longformer.selection.options import SelectionOptions
from adaptive_longformer.selection.pyramid import key_pyramid
from adaptive_longformer.selection.reference import reference_choice, reference_votes
from adaptive_longformer.selection.select_blocks import select_blocks

SMALL = SelectionOptions(num_blocks=3, block_size=16, query_block_size=16)


def random_keys(length, *, batch=2, heads=2, head_dim=8, coherent=True, seed=0):
    """Queries and keys; coherent ones drift slowly, as those of a text do."""
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, batch, heads, length, head_dim, generator=generator).double()
    if coherent:
        topic = torch.randn(batch, heads, -(-length // 32), head_dim, generator=generator)
        key = key * 0.5 + topic.double().repeat_interleave(32, dim=2)[:, :, :length] * 2
    return query, key


def chosen(selected, batch=0, head=0, row=0):
    count = selected.counts[batch, head, row]
    return selected.key_blocks[batch, head, row, :count].tolist()


@pytest.mark.parametrize("length", [1, 15, 16, 17, 200, 257])
def test_pyramid_means_are_the_means_of_all_tokens_below(length):
    key = torch.randn(2, 3, length, 4, dtype=torch.float64)
    members = torch.rand(2, length) < 0.7
    key[~members[:, None].expand(-1, 3, -1)] = torch.nan
    pyramid = key_pyramid(key, members, 4, 3)
    for level, (means, log_counts) in enumerate(zip(*pyramid)):
        span = 4 * 4**level
        assert means.shape[2] % 16 == 0
        for node in range(means.shape[2]):
            tokens = slice(node * span, (node + 1) * span)
            for batch in range(2):
                inside = members[batch, tokens]
                assert log_counts[batch, node].exp() == pytest.approx(int(inside.sum()))
                if inside.any():
                    expected = key[batch, :, tokens][:, inside].mean(dim=1)
                    torch.testing.assert_close(means[batch, :, node], expected)
                else:
                    assert not means[batch, :, node].any()


def masks_of(kind, batch, length):
    mask, is_global = None, None
    if kind in ("right", "holes", "both"):
        mask = torch.ones(batch, length, dtype=torch.bool)
        mask[-1, length - length // 3 :] = False
        if kind != "right":
            mask[0, length // 2 : length // 2 + 20] = False
    if kind in ("global", "both"):
        is_global = torch.zeros(batch, length, dtype=torch.bool)
        is_global[:, 0] = True
        is_global[0, 40:60] = True
    return mask, is_global


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("kind", "length", "window", "block_size", "query_block_size", "sub_block_size"),
    [
        ("none", 203, 24, 16, 16, 0),
        ("none", 208, 40, 16, 32, 2),
        ("right", 230, 8, 16, 16, 0),
        ("holes", 331, 33, 32, 16, 2),
        ("global", 200, 24, 16, 16, 16),
        ("both", 257, 50, 16, 64, 0),
        ("both", 257, 50, 24, 24, 8),
        ("none", 11, 4, 16, 16, 1),
        ("none", 130, 1000, 16, 16, 0),
    ],
)
def test_short_rows_choose_what_the_definition_chooses(
    kind, length, window, block_size, query_block_size, sub_block_size, is_causal
):
    query, key = random_keys(length)
    mask, is_global = masks_of(kind, 2, length)
    options = SelectionOptions(3, block_size, query_block_size, sub_block_size=sub_block_size)
    pattern = SlidingWindow(window)
    selected = select_blocks(
        query, key, pattern, options, attention_mask=mask, global_mask=is_global,
        is_causal=is_causal,
    )  # fmt: skip
    for batch in range(2):
        for head in range(2):
            for row in range(selected.counts.shape[2]):
                share, covered = reference_votes(
                    query[batch, head], key[batch, head], row, pattern, options,
                    valid=None if mask is None else mask[batch],
                    is_global=None if is_global is None else is_global[batch],
                    is_causal=is_causal,
                )  # fmt: skip
                expected = reference_choice(share, 3)
                assert chosen(selected, batch, head, row) == expected
                mass = selected.mass[batch, head, row, : len(expected)].tolist()
                assert mass == pytest.approx([share[block] for block in expected])
                if any(share.values()):
                    assert float(selected.covered[batch, head, row]) == pytest.approx(covered)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("length", "sub_block_size"), [(1000, 0), (1023, 2), (1040, 16)])
def test_a_beam_that_drops_nothing_equals_the_exact_search(length, sub_block_size, is_causal):
    query, key = random_keys(length, batch=1)
    exact = SelectionOptions(4, 16, 16, sub_block_size=sub_block_size)
    wide = replace(exact, start_nodes=5, beam_width=1000)
    mask = torch.ones(1, length, dtype=torch.bool)
    mask[:, 300:400] = False
    where = {"attention_mask": mask, "is_causal": is_causal}
    expected = select_blocks(query, key, SlidingWindow(30), exact, **where)
    actual = select_blocks(query, key, SlidingWindow(30), wide, **where)
    assert wide.start_level(-(-length // 16)) == 3
    assert torch.equal(actual.counts, expected.counts)
    assert torch.equal(actual.key_blocks, expected.key_blocks)
    torch.testing.assert_close(actual.mass, expected.mass)
    torch.testing.assert_close(actual.covered, expected.covered)


def beam_by_hand(query, key, row, window, options):
    """One head's choice for one query block without masks, as sets of nodes."""
    length = len(query)
    size, scale = options.block_size, query.shape[1] ** -0.5
    start = row * options.query_block_size
    end = min(start + options.query_block_size, length)
    runs = range(start, end, options.tokens_per_vote)
    votes = [query[t : min(t + options.tokens_per_vote, end)].mean(dim=0) * scale for t in runs]
    num_blocks = -(-length // size)
    last_key = [min((block + 1) * size, length) - 1 for block in range(num_blocks)]
    covered = {
        block
        for block in range(num_blocks)
        if block * size >= end - 1 - window and last_key[block] <= start + window
    }

    def mass(level, node, vote):
        """exp of the bound of a node; level 0 has quarters of blocks."""
        span = size // 4 * 4**level
        tokens = key[node * span : (node + 1) * span]
        blocks = {node // 4} if level == 0 else set(range(node * 4 ** (level - 1), num_blocks))
        if level > 0:
            blocks &= set(range((node + 1) * 4 ** (level - 1)))
        if not len(tokens) or blocks <= covered:
            return torch.zeros(())
        return (vote @ tokens.mean(dim=0)).exp() * len(tokens)

    def look_ahead(level, node, vote):
        return sum(mass(level - 1, 4 * node + child, vote) for child in range(4))

    near = []
    for vote in votes:
        quarters = [4 * block + child for block in covered for child in range(4)]
        spans = [key[q * size // 4 : (q + 1) * size // 4] for q in quarters]
        near.append(sum(((vote @ s.mean(dim=0)).exp() * len(s) for s in spans if len(s)), 0.0))
    level = options.start_level(num_blocks)
    candidates = list(range(-(-num_blocks // 4 ** (level - 1))))
    dropped = [0.0] * len(votes)
    while True:
        share = dict.fromkeys(candidates, 0.0)
        masses = [[look_ahead(level, node, vote) for node in candidates] for vote in votes]
        for vote in range(len(votes)):
            total = sum(masses[vote]) + near[vote] + dropped[vote]
            for node, value in zip(candidates, masses[vote]):
                share[node] += float(value / total) / len(votes)
        ranked = [node for node in sorted(share, key=lambda v: -share[v]) if share[node] > 0]
        if level == 1:
            return ranked[: options.num_blocks]
        kept = ranked[: options.beam_width]
        for vote in range(len(votes)):
            dropped[vote] += sum(m for n, m in zip(candidates, masses[vote]) if n not in kept)
        candidates = [4 * node + child for node in kept for child in range(4)]
        level -= 1


def test_long_rows_search_with_a_beam():
    query, key = random_keys(1100, batch=1, heads=1)
    options = SelectionOptions(5, 16, 16, start_nodes=6, beam_width=3)
    selected = select_blocks(query, key, SlidingWindow(20), options)
    exact = select_blocks(query, key, SlidingWindow(20), SelectionOptions(5, 16, 16))
    for row in range(0, 69, 4):
        expected = beam_by_hand(query[0, 0], key[0, 0], row, 20, options)
        assert chosen(selected, row=row) == expected
    assert not torch.equal(selected.key_blocks, exact.key_blocks)


def test_visited_nodes_grow_with_the_logarithm_of_the_length():
    options = SelectionOptions()
    lengths = [2**k for k in range(14, 24)]
    visited = [options.visited_nodes(length // 64) for length in lengths]
    for shorter, longer in itertools.pairwise(visited):
        assert longer - shorter <= 256
    assert visited[-1] <= visited[0] + 256 * 5


def pad(tensor, left, right, dim):
    size = list(tensor.shape)
    pieces = [tensor]
    for amount, before in ((left, True), (right, False)):
        size[dim] = amount
        filler = torch.full(size, 7, dtype=tensor.dtype)
        pieces = [filler, *pieces] if before else [*pieces, filler]
    return torch.cat(pieces, dim=dim)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("amount", [1, 16, 1000])
@pytest.mark.parametrize("start_nodes", [256, 4])
def test_padding_on_the_right_changes_no_choice(amount, start_nodes, is_causal):
    query, key = random_keys(331)
    options = SelectionOptions(3, 16, 16, start_nodes=start_nodes, beam_width=4)
    window = SlidingWindow(20)
    expected = select_blocks(query, key, window, options, is_causal=is_causal)
    mask = pad(torch.ones(2, 331, dtype=torch.bool), 0, amount, 1)
    mask[:, 331:] = False
    padded = select_blocks(
        pad(query, 0, amount, 2), pad(key, 0, amount, 2), window, options, attention_mask=mask,
        is_causal=is_causal,
    )  # fmt: skip
    rows = expected.counts.shape[2]
    assert torch.equal(padded.counts[:, :, :rows], expected.counts)
    assert torch.equal(padded.key_blocks[:, :, :rows], expected.key_blocks)
    torch.testing.assert_close(padded.mass[:, :, :rows], expected.mass)


@pytest.mark.parametrize("kind", ["none", "right", "holes", "global", "both", "all"])
@pytest.mark.parametrize("num_global_blocks", [0, 2])
def test_nothing_that_is_looked_up_changes_a_choice(kind, num_global_blocks, monkeypatch):
    query, key = random_keys(331)
    mask, is_global = masks_of("right" if kind == "all" else kind, 2, 331)
    if kind == "all":
        assert mask is not None
        mask[0] = False
    options = replace(SMALL, num_global_blocks=num_global_blocks)
    directions = torch.randn(2, 8, generator=torch.Generator().manual_seed(1)).double()
    results = []
    for looks_up in (True, False):
        if not looks_up:
            monkeypatch.setattr(selection, "_READ_BACK", ())  # as on a GPU
        results.append(
            select_blocks(
                query, key, SlidingWindow(20), options, attention_mask=mask,
                global_mask=is_global, max_global_tokens=30,
                global_directions=directions,
            )
        )  # fmt: skip
    assert results[0].counts.any()
    for name, expected, actual in zip(results[0]._fields, *results, strict=True):
        torch.testing.assert_close(actual, expected, msg=name)


def test_tokens_beyond_the_limit_of_global_ones_are_ordinary():
    query, key = random_keys(200)
    _, is_global = masks_of("global", 2, 200)
    assert is_global is not None
    first = is_global & (is_global.cumsum(dim=1) <= 3)
    assert not torch.equal(first, is_global)
    limited, expected = (
        select_blocks(query, key, SlidingWindow(8), SMALL, global_mask=mask, max_global_tokens=most)
        for mask, most in ((is_global, 3), (first, None))
    )
    for actual, wanted in zip(limited, expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("token", [0, 100, 333, 470, 511])
@pytest.mark.parametrize("start_nodes", [256, 3])
def test_a_causal_choice_knows_nothing_of_its_own_block_or_later(token, start_nodes):
    query, key = random_keys(512, batch=1)
    options = SelectionOptions(3, 16, 16, start_nodes=start_nodes, beam_width=2)
    is_global = torch.zeros(1, 512, dtype=torch.bool)
    is_global[:, [0, 300]] = True
    where = {"global_mask": is_global, "is_causal": True}
    before = select_blocks(query, key, SlidingWindow(10), options, **where)
    query[:, :, token] += 3.0
    key[:, :, token] -= 5.0
    after = select_blocks(query, key, SlidingWindow(10), options, **where)
    unchanged = token // 16 + 1  # the block of the token itself is voted by the one before
    for name in ("key_blocks", "counts", "mass", "covered"):
        first, second = getattr(before, name), getattr(after, name)
        assert torch.equal(first[:, :, :unchanged], second[:, :, :unchanged]), name
    if token < 470:
        assert not torch.equal(before.mass, after.mass)


@pytest.mark.parametrize("start_nodes", [256, 4])
def test_a_causal_prefix_chooses_as_in_the_whole(start_nodes):
    query, key = random_keys(600, batch=1)
    options = SelectionOptions(3, 16, 16, start_nodes=start_nodes, beam_width=3)
    whole = select_blocks(query, key, SlidingWindow(10), options, is_causal=True)
    for length in (1, 40, 333, 592):
        part = select_blocks(
            query[:, :, :length], key[:, :, :length], SlidingWindow(10), options, is_causal=True
        )
        rows = part.counts.shape[2]
        assert torch.equal(part.key_blocks, whole.key_blocks[:, :, :rows])
        torch.testing.assert_close(part.mass, whole.mass[:, :, :rows])


@pytest.mark.parametrize("start_nodes", [256, 4])
@pytest.mark.parametrize(("length", "given"), [(600, 600), (600, 40), (593, 17), (592, 32)])
def test_the_last_queries_alone_choose_as_in_the_whole(start_nodes, length, given):
    query, key = random_keys(length)
    mask, is_global = masks_of("both", 2, length)
    options = SelectionOptions(3, 16, 16, start_nodes=start_nodes, beam_width=3)
    where = {
        "attention_mask": mask, "global_mask": is_global, "is_causal": True,
    }  # fmt: skip
    whole = select_blocks(query, key, SlidingWindow(10), options, **where)
    last = select_blocks(query[:, :, -given:], key, SlidingWindow(10), options, **where)
    rows = last.counts.shape[2]
    assert not last.counts[:, :, 0].any()
    for name in ("key_blocks", "counts", "mass", "covered"):
        expected, actual = getattr(whole, name)[:, :, -rows:], getattr(last, name)
        torch.testing.assert_close(actual[:, :, 1:], expected[:, :, 1:], msg=name)


def test_queries_that_are_not_the_last_ones_from_a_block_on_are_refused():
    query, key = random_keys(100)
    for given, is_causal in ((36, False), (35, True), (101, True)):
        some = torch.cat([query, query], dim=2)[:, :, :given]
        with pytest.raises(ValueError, match=f"query has {given} tokens and key 100: .* fewer"):
            select_blocks(some, key, SlidingWindow(10), SMALL, is_causal=is_causal)


def test_no_past_block_is_out_of_reach_under_causality():
    """Each block in turn is made the one that every query looks for."""
    length, options = 16 * 70, SelectionOptions(1, 16, 16, start_nodes=4, beam_width=1)
    query = torch.ones(1, 1, length, 4)
    for target in range(0, 69, 3):
        key = torch.zeros(1, 1, length, 4)
        key[:, :, target * 16 : (target + 1) * 16] = 20.0
        selected = select_blocks(query, key, SlidingWindow(0), options, is_causal=True)
        for row in range(target + 1, 70):
            assert chosen(selected, row=row) == [target], (target, row)


def test_nothing_is_chosen_twice_or_beside_the_row():
    query, key = random_keys(900, coherent=False)
    mask = torch.rand(2, 900) < 0.5
    mask[:, 0] = True
    options = SelectionOptions(8, 16, 16, start_nodes=8, beam_width=5)
    for is_causal in (False, True):
        selected = select_blocks(
            query, key, SlidingWindow(20), options, attention_mask=mask, is_causal=is_causal
        )
        layout, _ = selection_layout(selected, SlidingWindow(20), 900, options)
        layout.validate()


def test_shared_key_heads_choose_as_repeated_ones():
    query, key = random_keys(400, heads=4)
    few = key[:, :2]
    shared = select_blocks(query, few, SlidingWindow(10), SMALL)
    repeated = select_blocks(query, few.repeat_interleave(2, dim=1), SlidingWindow(10), SMALL)
    assert torch.equal(shared.key_blocks, repeated.key_blocks)


def test_blocks_for_the_whole_row_follow_the_direction():
    query, key = random_keys(400, batch=1)
    options = SelectionOptions(3, 16, 16, num_global_blocks=2)
    directions = torch.zeros(2, 8)
    directions[1] = key[0, 1, 160:176].mean(dim=0) * 10
    selected = select_blocks(query, key, SlidingWindow(20), options, global_directions=directions)
    assert selected.global_blocks[0, 0].tolist() == [0, 1]  # all alike: the first ones
    assert selected.global_blocks[0, 1, 0] == 10
    torch.testing.assert_close(selected.global_means[0, 1, 0], key[0, 1, 160:176].mean(dim=0))
    assert not selected.global_open[0, 1, 10, 0]
    assert selected.global_open[0, 1, 20].all()
    layout, slots = selection_layout(selected, SlidingWindow(20), 400, options)
    layout.validate()
    far = (layout.flags[0, 1, 20] & EntryFlag.SELECTED) != 0
    assert layout.key_blocks[0, 1, 20][far][-2:].tolist() == selected.global_blocks[0, 1].tolist()
    assert slots[0, 1, 20][far].tolist() == [0, 1, 2, 3, 4]


def test_a_row_has_no_more_blocks_for_the_whole_row_than_blocks():
    query, key = random_keys(40, batch=1)
    options = SelectionOptions(1, 16, 16, num_global_blocks=4)
    mask = torch.ones(1, 40, dtype=torch.bool)
    mask[:, 16:32] = False  # an empty block
    selected = select_blocks(query, key, SlidingWindow(2), options, attention_mask=mask)
    assert selected.global_blocks[0, 0].tolist() == [0, 2, 0, 0]
    assert not selected.global_open[..., 2:].any()
    selection_layout(selected, SlidingWindow(2), 40, options)[0].validate()


def test_rank_limit_shortens_the_lists():
    query, key = random_keys(400, batch=1)
    selected = select_blocks(query, key, SlidingWindow(20), SMALL)
    layout, slots = selection_layout(selected, SlidingWindow(20), 400, SMALL, torch.tensor([0, 2]))
    layout.validate()
    assert (slots[0, 0] == -1).all()
    assert slots[0, 1].max() == 1


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


def test_keys_that_are_not_finite_raise_on_request_and_choose_nothing_otherwise():
    query, key = random_keys(300)
    key[1, 0, 77, 3] = torch.nan
    with pytest.raises(ValueError, match=r"key is NaN .* batch row 1, head 0, token 77"):
        select_blocks(query, key, SlidingWindow(20), SMALL, validate=True)
    options = SelectionOptions(3, 16, 16, start_nodes=4, beam_width=2)
    for choice in (SMALL, options):
        selected = select_blocks(query, key, SlidingWindow(20), choice)
        selection_layout(selected, SlidingWindow(20), 300, choice)[0].validate()
        assert not selected.counts[1, 0].any()
        assert selected.counts[0].all()
    mask = torch.ones(2, 300, dtype=torch.bool)
    mask[1, 77] = False
    select_blocks(
        query, key, SlidingWindow(20), SMALL, attention_mask=mask, validate=True
    )  # padding may be anything


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_blocks": 0}, "num_blocks is 0, at least 1"),
        ({"start_nodes": 0}, "start_nodes is 0, at least 1"),
        ({"beam_width": 0}, "beam_width is 0, at least 1"),
        ({"block_size": 18}, "block_size is 18, a multiple of 4"),
        ({"query_block_size": 18}, "query_block_size is 18, a multiple of"),
        ({"num_global_blocks": -1}, "num_global_blocks is -1, at least 0"),
        ({"sub_block_size": 12}, "sub_block_size is 12, a divisor of block_size = 64"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SelectionOptions(**arguments)


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
        chosen_slots = [s[0, 0, row][s[0, 0, row] >= 0].tolist() for s in (slots, whole_slots)]
        assert chosen_slots[0] == chosen_slots[1]
    span = AttentionSpan(reach + 1.0 - 5.0, 5.0)  # the ramp ends where the reach does
    expected = sparse_attention(query, key, value, whole, span=span, backend="reference")
    for backend in ("reference", "blocked"):
        actual = sparse_attention(query, key, value, layout, span=span, backend=backend)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("start_nodes", [256, 4])
@pytest.mark.parametrize("length", [100, 1000])
@pytest.mark.parametrize("sub_block_size", [0, 2])
def test_the_compiled_vote_equals_that_of_torch(
    length, start_nodes, sub_block_size, is_causal, monkeypatch
):
    skip_without_cpp_compiler()
    query, key = (tensor.float() for tensor in random_keys(length))
    query[0, 0, 40:44] = torch.nan
    mask, is_global = masks_of("both", 2, length)
    options = SelectionOptions(
        3, 16, 16, start_nodes=start_nodes, beam_width=3, sub_block_size=sub_block_size
    )

    def select():
        return select_blocks(
            query,
            key,
            SlidingWindow(16),
            options,
            attention_mask=mask,
            global_mask=is_global,
            is_causal=is_causal,
        )

    calls, vote = [], voting.compiled_vote
    monkeypatch.setattr(voting, "compiled_vote", lambda *args: calls.append(0) or vote(*args))
    compiled = select()
    assert calls
    monkeypatch.setattr(voting, "can_vote", lambda scores: False)
    expected = select()
    torch.testing.assert_close(compiled.key_blocks, expected.key_blocks)
    torch.testing.assert_close(compiled.counts, expected.counts)
    torch.testing.assert_close(compiled.mass, expected.mass)
    torch.testing.assert_close(compiled.covered, expected.covered, equal_nan=True)
