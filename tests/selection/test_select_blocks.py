from dataclasses import replace

import pytest
import torch
from selection_calls import SMALL, chosen, masks_of, random_keys

from adaptive_longformer.attention import global_keys
from adaptive_longformer.patterns import EntryFlag, SlidingWindow
from adaptive_longformer.selection.lists import selection_layout
from adaptive_longformer.selection.options import SelectionOptions
from adaptive_longformer.selection.select_blocks import select_blocks


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
@pytest.mark.parametrize("num_candidates", [4096, 32])
def test_padding_on_the_right_changes_no_choice(amount, num_candidates, is_causal):
    query, key = random_keys(331)
    options = SelectionOptions(3, 16, 16, num_candidates=num_candidates)
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
            monkeypatch.setattr(global_keys, "_READ_BACK", ())  # as on a GPU
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
    assert limited.log_weights is None and expected.log_weights is None
    for actual, wanted in zip(limited[:-1], expected[:-1], strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("token", [0, 100, 333, 470, 511])
@pytest.mark.parametrize("num_candidates", [4096, 32])
def test_a_causal_choice_knows_nothing_of_its_own_block_or_later(token, num_candidates):
    query, key = random_keys(512, batch=1)
    options = SelectionOptions(3, 16, 16, num_candidates=num_candidates)
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


@pytest.mark.parametrize("num_candidates", [4096, 32])
def test_a_causal_prefix_chooses_as_in_the_whole(num_candidates):
    query, key = random_keys(600, batch=1)
    options = SelectionOptions(3, 16, 16, num_candidates=num_candidates)
    whole = select_blocks(query, key, SlidingWindow(10), options, is_causal=True)
    for length in (1, 40, 333, 592):
        part = select_blocks(
            query[:, :, :length], key[:, :, :length], SlidingWindow(10), options, is_causal=True
        )
        rows = part.counts.shape[2]
        assert torch.equal(part.key_blocks, whole.key_blocks[:, :, :rows])
        torch.testing.assert_close(part.mass, whole.mass[:, :, :rows])


@pytest.mark.parametrize("num_candidates", [4096, 32])
@pytest.mark.parametrize(("length", "given"), [(600, 600), (600, 40), (593, 17), (592, 32)])
def test_the_last_queries_alone_choose_as_in_the_whole(num_candidates, length, given):
    query, key = random_keys(length)
    mask, is_global = masks_of("both", 2, length)
    options = SelectionOptions(3, 16, 16, num_candidates=num_candidates)
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
    length, options = 16 * 70, SelectionOptions(1, 16, 16, num_candidates=32)
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
    options = SelectionOptions(8, 16, 16, num_candidates=64)
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
    assert slots[0, 1, 20][far].tolist() == [1, 2, 3, 4, 5]


def test_a_row_has_no_more_blocks_for_the_whole_row_than_blocks():
    query, key = random_keys(40, batch=1)
    options = SelectionOptions(1, 16, 16, num_global_blocks=4)
    mask = torch.ones(1, 40, dtype=torch.bool)
    mask[:, 16:32] = False  # an empty block
    selected = select_blocks(query, key, SlidingWindow(2), options, attention_mask=mask)
    assert selected.global_blocks[0, 0].tolist() == [0, 2, 0, 0]
    assert not selected.global_open[..., 2:].any()
    selection_layout(selected, SlidingWindow(2), 40, options)[0].validate()


def test_keys_that_are_not_finite_raise_on_request_and_are_not_chosen_otherwise():
    query, key = random_keys(300, coherent=False)
    key[1, 0, 77, 3] = torch.nan
    with pytest.raises(ValueError, match=r"key is NaN .* batch row 1, head 0, token 77"):
        select_blocks(query, key, SlidingWindow(20), SMALL, validate=True)
    for choice in (SMALL, replace(SMALL, num_candidates=32)):
        before = select_blocks(query.nan_to_num(), key.nan_to_num(), SlidingWindow(20), choice)
        selected = select_blocks(query, key, SlidingWindow(20), choice)
        selection_layout(selected, SlidingWindow(20), 300, choice)[0].validate()
        assert (before.key_blocks[1, 0] == 4).any()
        assert not (selected.key_blocks[1, 0] == 4).any()
        assert torch.equal(selected.key_blocks[0], before.key_blocks[0])
        assert selected.counts.all()
    mask = torch.ones(2, 300, dtype=torch.bool)
    mask[1, 77] = False
    select_blocks(
        query, key, SlidingWindow(20), SMALL, attention_mask=mask, validate=True
    )  # padding may be anything


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_blocks": 0}, "num_blocks is 0, at least 1"),
        ({"block_size": 18}, "block_size is 18, a multiple of 4"),
        ({"query_block_size": 0}, "query_block_size is 0, at least 1"),
        ({"num_candidates": 0}, "num_candidates is 0, at least 1"),
        ({"num_global_blocks": -1}, "num_global_blocks is -1, at least 0"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SelectionOptions(**arguments)
