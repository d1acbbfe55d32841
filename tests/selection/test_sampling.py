"""Blocks drawn by chance: what is drawn, what it stands for, and that on the whole it is right."""

import math
from dataclasses import replace

import pytest
import torch
from calls import pairwise, readable, skip_without_cpp_compiler
from selection_calls import chosen, make_call, random_keys, stages_of
from triton_on_cpu import needs_triton

from adaptive_longformer.attention.functional import sparse_attention
from adaptive_longformer.patterns import Full, SlidingWindow
from adaptive_longformer.selection.compiled_select import compiled_choice
from adaptive_longformer.selection.exact import exact_choice, torch_choice
from adaptive_longformer.selection.lists import selection_layout, weights_of_entries
from adaptive_longformer.selection.options import SelectionOptions
from adaptive_longformer.selection.reference import reference_masses
from adaptive_longformer.selection.select_blocks import select_blocks

SEED = 3
GRID = {
    "is_causal": [False, True],
    "masks": ["none", "right", "both"],
    "sizes": [(16, 16), (16, 64), (64, 16), (32, 24)],
    "length": [31, 203, 257],
    "key_heads": [1, 2],
    "shared": [False, True],
}


def mix(word):
    """By hand, on 32 bits."""
    word = (word ^ (word >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    word = (word ^ (word >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return word ^ (word >> 16)


def chance(head, row, block, seed):
    word = mix(mix(head ^ mix(seed)) ^ row)
    return ((mix(word ^ mix(block)) >> 8) + 1) / 2**24


def check(call, choice):
    """With the definition: priorities are masses over chances, the largest are chosen."""
    for batch in range(call.query.shape[0]):
        for head in range(call.query.shape[1]):
            for row in range(call.num_rows):
                mass, _ = reference_masses(call, batch, head, row)
                priority = {
                    block: value / chance(head, call.first_row + row, block, call.sampling_seed)
                    for block, value in mass.items()
                    if value > 1e-30
                }
                best = sorted(priority, key=lambda block: -priority[block])
                at = (batch, head, row)
                assert chosen(choice, *at) == best[: call.num_blocks]
                of_best = [mass[block] for block in best[: call.num_blocks]]
                assert choice.mass[at][: len(of_best)].tolist() == pytest.approx(of_best, abs=2e-6)
                rest = best[call.num_blocks :]
                threshold = priority[rest[0]] if rest else 0.0
                assert float(choice.threshold[at]) == pytest.approx(threshold, rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("options", pairwise(GRID), ids=readable)
def test_the_largest_priorities_are_chosen(options):
    call = replace(make_call(options), sampling_seed=SEED)
    check(call, torch_choice(call))
    skip_without_cpp_compiler()
    check(call, compiled_choice(call, uses_bytes=False))


@needs_triton
@pytest.mark.parametrize("has_places", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_triton_draws_what_torch_does(is_causal, has_places, triton_interpreter):
    call = make_call(
        {"length": 290 if has_places else 130, "masks": "both", "is_causal": is_causal}
    )
    call = replace(call, sampling_seed=SEED)
    if has_places:
        call = stages_of(call, num_candidates=48)[-1]
        assert (call.places.weights > 1).any()
    module = "adaptive_longformer.selection.triton_select"
    actual = triton_interpreter(module, "triton_choice", call)
    expected = torch_choice(call)
    assert torch.equal(actual.key_blocks, expected.key_blocks)
    torch.testing.assert_close(actual.mass, expected.mass, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(actual.threshold, expected.threshold, atol=1e-9, rtol=1e-4)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("sizes", [(16, 16), (16, 8), (32, 64)])
def test_every_stage_draws(is_causal, sizes):
    options = {"length": 450, "masks": "both", "is_causal": is_causal, "sizes": sizes}
    call = replace(make_call(options), sampling_seed=SEED)
    coarse, fine = stages_of(call, num_candidates=64)
    assert len({coarse.sampling_seed, fine.sampling_seed, -1}) == 3
    check(coarse, torch_choice(coarse))
    assert (fine.places.weights > 1).sum() > 50
    check(fine, torch_choice(fine))
    skip_without_cpp_compiler()
    check(fine, compiled_choice(fine, uses_bytes=False))


def test_on_average_blocks_of_several_stages_stand_for_one_each():
    """Three stages: over many seeds the weights of every block have the mean 1."""
    call = make_call({"length": 1500, "key_heads": 1}, num_blocks=24, batch=1, heads=1)
    assert len(stages_of(replace(call, sampling_seed=0), num_candidates=40)) == 3
    found, seeds = [], 1500
    for seed in range(seeds):
        choice = exact_choice(replace(call, sampling_seed=seed), num_candidates=40)
        weights = choice.log_weights[0, 0].double().exp() * (choice.mass[0, 0] > 0)
        filled = torch.zeros(call.num_rows, call.num_key_blocks, dtype=torch.float64)
        found.append(filled.scatter_add(1, choice.key_blocks[0, 0].long(), weights))
    found = torch.stack(found)
    # Those that are hardly ever drawn have no error to go by.
    is_often = (found > 0).sum(dim=0) > 30
    error = found.std(dim=0) / math.sqrt(seeds)
    distance = (found.mean(dim=0) - 1)[is_often] / error[is_often]
    assert is_often.sum() > 1000 and distance.abs().max() < 5.5
    assert distance.abs().mean() < 1.0 and distance.mean().abs() < 0.2


def test_the_last_queries_draw_what_all_of_them_do():
    """Chances go by the place in the sequence, not in the call."""
    call = replace(make_call({"length": 208, "is_causal": True}), sampling_seed=SEED)
    every = torch_choice(call)
    last = torch_choice(replace(call, query=call.query[:, :, 128:]))
    assert torch.equal(last.key_blocks[:, :, 1:], every.key_blocks[:, :, 9:])
    assert torch.equal(last.threshold[:, :, 1:], every.threshold[:, :, 9:])


def test_on_average_blocks_stand_for_all_of_them():
    """Over many seeds weight * mass of what is chosen has the mass of every block as its mean."""
    call = make_call({"length": 203, "key_heads": 1}, num_blocks=4, batch=1, heads=1)
    share = torch_choice(call, with_share=True).share[0, 0].double()
    found = []
    for seed in range(2000):
        choice = torch_choice(replace(call, sampling_seed=seed))
        mass, threshold = choice.mass[0, 0].double(), choice.threshold[0, 0, :, None].double()
        weighted = torch.maximum(mass, threshold) * (mass > 0)
        filled = torch.zeros_like(share)
        found.append(filled.scatter_add(1, choice.key_blocks[0, 0].long(), weighted))
    found = torch.stack(found)
    is_open = (found > 0).any(dim=0)
    error = found.std(dim=0) / math.sqrt(len(found))
    assert is_open.sum() > 100  # of 13 x 13
    distance = (found.mean(dim=0) - share).abs()[is_open] / error[is_open].clamp(min=1e-12)
    assert distance.max() < 5 and distance.mean() < 1.0


@pytest.mark.parametrize("num_blocks", [4, 12])
def test_attention_is_right_on_average(num_blocks):
    """Of queries that attend to everything a little, the largest blocks say little."""
    query, key = random_keys(512, batch=1, heads=1, head_dim=8, coherent=False)
    value = key.roll(7, dims=-1)
    query = query * 0.5
    window = SlidingWindow(16)
    full = sparse_attention(query, key, value, Full())

    def error(seed):
        options = SelectionOptions(num_blocks, 16, 16, sampling_seed=seed)
        selected = select_blocks(query, key, window, options)
        layout, slots = selection_layout(selected, window, 512, options)
        bias = weights_of_entries(selected, slots)
        assert (bias is None) == (seed < 0)
        return sparse_attention(query, key, value, layout, entry_bias=bias) - full

    largest = error(-1)
    drawn = torch.stack([error(seed) for seed in range(60)])
    assert drawn.flatten(1).norm(dim=1).mean() < 0.95 * largest.norm()
    # And the error is noise: a mean of 60 has an eighth of it left.
    assert drawn.mean(dim=0).norm() < 0.2 * largest.norm()


def test_where_everything_is_read_it_stands_for_itself():
    query, key = random_keys(200)
    options = SelectionOptions(13, 16, 16, sampling_seed=SEED)
    selected = select_blocks(query, key, SlidingWindow(16), options)
    plain = select_blocks(query, key, SlidingWindow(16), replace(options, sampling_seed=-1))
    assert selected.log_weights is not None and not selected.log_weights.any()
    assert torch.equal(selected.counts, plain.counts) and plain.log_weights is None


def test_seeds_layers_and_heads_draw_their_own():
    query, key = random_keys(400, heads=1)
    query, key = (tensor.expand(-1, 2, -1, -1) for tensor in (query, key))

    def drawn(seed):
        options = SelectionOptions(2, 16, 16, sampling_seed=seed)
        return select_blocks(query, key, SlidingWindow(16), options).key_blocks

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))
    assert not torch.equal(drawn(1)[:, 0], drawn(1)[:, 1])
