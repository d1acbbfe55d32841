import ctypes
import os
import platform
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calls import pairwise, readable, skip_without_cpp_compiler
from selection_calls import as_bytes, compare, make_call, stages_of

from adaptive_longformer.attention.kernels.build import SOURCES
from adaptive_longformer.patterns import SlidingWindow
from adaptive_longformer.selection.compiled_select import compiled_choice
from adaptive_longformer.selection.exact import TOKENS_PER_MEAN, exact_choice, torch_choice
from adaptive_longformer.selection.exact_call import ExactCall
from adaptive_longformer.selection.means import run_means
from adaptive_longformer.selection.options import SelectionOptions
from adaptive_longformer.selection.select_blocks import select_blocks
from adaptive_longformer.testing import use_library

GRID = {
    "is_causal": [False, True],
    "masks": ["none", "right", "holes", "global", "both"],
    "sizes": [(16, 16), (16, 64), (64, 16), (32, 24), (64, 64), (8, 128)],
    "length": [1, 31, 64, 203, 257],
    "window": [(8, 8), (40, 12), (1000, 1000)],
    "key_heads": [1, 2, 4],
    "dtype": [torch.float32, torch.bfloat16, torch.float16, torch.float64],
    "head_dim": [6, 20, 64],
    "shared": [False, True],
}


def all_choices(call):
    """By what they are computed with."""
    yield "torch", torch_choice(call, with_share=True, with_dropped=True)
    if call.query.dtype != torch.float64:
        skip_without_cpp_compiler()
        yield "floats", best_first(call, False)
        yield "bytes", best_first(as_bytes(call), True)


def best_first(call, uses_bytes):
    """The compiled choice with all it returns, its blocks in the order that they have without
    `log_dropped`.
    """
    choice = compiled_choice(call, uses_bytes, True, True)
    order = choice.mass.sort(dim=-1, descending=True, stable=True).indices
    choice = choice._replace(
        key_blocks=choice.key_blocks.gather(-1, order), mass=choice.mass.gather(-1, order)
    )
    assert equal(choice[:5], compiled_choice(call, uses_bytes, True)[:5])
    return choice


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("options", pairwise(GRID), ids=readable)
def test_choices_match_definition(options):
    call = make_call(options)
    for kind, choice in all_choices(call):
        compare(call, choice, kind)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("masks", ["none", "both"])
@pytest.mark.parametrize("sizes", [(16, 16), (64, 16), (16, 64), (32, 24), (64, 128)])
def test_two_stages_match_definition(sizes, masks, is_causal):
    """Every stage is what the definition says about what the stage before kept."""
    call = make_call(
        {"sizes": sizes, "masks": masks, "is_causal": is_causal, "length": 650, "key_heads": 2},
        batch=1,
        heads=2,
    )
    calls = stages_of(call, num_candidates=64)
    coarse, fine = calls
    assert coarse.tokens_per_key >= 16 and fine.places is not None
    assert (fine.places.counts > 0).any()
    assert (fine.places.counts < 0).any() == is_causal
    for step in calls:
        choices = dict(all_choices(step))
        compare(step, choices["torch"], "torch")
        compare(step, choices["floats"], "floats")
        compare(step, choices["bytes"], "bytes")
        dropped = choices["torch"].log_dropped
        is_large = dropped > 0.0  # the library takes what is kept out of a sum
        torch.testing.assert_close(
            choices["floats"].log_dropped[is_large], dropped[is_large], atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("is_causal", [False, True])
def test_rows_of_up_to_twice_as_many_keys_as_candidates_meet_all(is_causal):
    call = make_call({"length": 512, "is_causal": is_causal})
    every, just, few = (exact_choice(call, count) for count in (512, 256, 240))
    assert torch.equal(just.key_blocks, every.key_blocks) and torch.equal(just.mass, every.mass)
    assert not torch.equal(few.mass, every.mass)


@pytest.mark.parametrize("is_causal", [False, True])
def test_many_stages_drop_little_of_what_is_large(is_causal):
    call = make_call({"length": 4000, "is_causal": is_causal}, num_blocks=1, batch=1, heads=2)
    # One block of each row's keys fits its queries, and nothing else does.
    target = (torch.arange(4000) // 64) * 7 % 62
    call.key.mul_(0.1)
    directions = torch.randn(62, 16, generator=torch.Generator().manual_seed(1))
    directions = directions / directions.norm(dim=-1, keepdim=True) * 8
    call.key[:] += directions[(torch.arange(4000) // 64).clamp(max=61)]
    call.query[:] = directions[target]
    every = exact_choice(call, num_candidates=4000)
    few = exact_choice(call, num_candidates=128)
    is_clear = every.mass[..., 0] > 0.2  # not covered by the window
    assert is_clear.float().mean() > 0.4
    assert (every.key_blocks == few.key_blocks)[is_clear].float().mean() > 0.97


def test_enough_candidates_change_nothing():
    call = make_call({"length": 500, "masks": "both"})
    assert equal(exact_choice(call, 500), exact_choice(call, 10**6))


@pytest.mark.parametrize("uses_bytes", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_two_threads_choose_what_one_does(is_causal, uses_bytes):
    skip_without_cpp_compiler()
    call = make_call({"length": 300, "masks": "both", "is_causal": is_causal})
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(compiled_choice(call, uses_bytes, True, True))
    finally:
        torch.set_num_threads(before)
    assert equal(results[0], results[1]) and equal(results[0], results[2])


@pytest.mark.parametrize("num_candidates", [128, 1000])
@pytest.mark.parametrize("sizes", [(16, 16), (64, 64), (64, 16), (16, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_last_queries_choose_what_all_of_them_do(dtype, sizes, num_candidates):
    """As in cached decoding: those of the block before, and the first of the block."""
    whole = make_call(
        {"length": 777, "sizes": sizes, "masks": "global", "is_causal": True, "dtype": dtype}
    )
    size = sizes[0]
    expected = exact_choice(whole, num_candidates)
    for row in range(1, whole.num_rows):
        start, end = (row - 1) * size, row * size + 1
        assert whole.voters is not None and whole.key_counts is not None
        last = replace(
            whole,
            query=whole.query[:, :, start:end],
            key=whole.key[:, :, :end],
            length=end,
            voters=whole.voters[:, :end],
            key_counts=whole.key_counts[:, :end],
            ends=None,
            global_positions=whole.global_positions.clamp(max=end),
        )
        run = TOKENS_PER_MEAN
        known = (end - 1) // run
        means = run_means(whole.key[:, :, : known * run], whole.key_counts[:, : known * run], run)
        for given in (last, replace(last, means=means)):
            actual = exact_choice(given, num_candidates)
            is_bitwise = dtype == torch.float32  # else torch's own sums decide
            torch.testing.assert_close(
                actual.mass[:, :, 1],
                expected.mass[:, :, row],
                **(dict(atol=0, rtol=0) if is_bitwise else dict(atol=1e-12, rtol=1e-12)),
            )
            assert torch.equal(actual.key_blocks[:, :, 1], expected.key_blocks[:, :, row])
            assert torch.equal(actual.counts[:, :, 1], expected.counts[:, :, row])


@pytest.mark.parametrize("num_candidates", [128, 1000])
def test_later_tokens_change_no_earlier_choice(num_candidates):
    call = make_call({"length": 600, "is_causal": True})
    before = exact_choice(call, num_candidates)
    call.query[:, :, 320:] = 30.0
    call.key[:, :, 320:] = torch.nan
    after = exact_choice(call, num_candidates)
    for old, new in zip(before[:4], after[:4], strict=True):
        assert torch.equal(old[:, :, :21], new[:, :, :21])
    assert not torch.equal(before.mass, after.mass)


@pytest.mark.parametrize("num_candidates", [128, 1000])
@pytest.mark.parametrize("sizes", [(16, 16), (64, 64), (32, 24)])
def test_padding_behind_changes_nothing(sizes, num_candidates):
    call = make_call({"length": 400, "sizes": sizes})
    expected = exact_choice(call, num_candidates)
    padded = make_call({"length": 460, "sizes": sizes})
    padded.query[:, :, :400], padded.key[:, :, :400] = call.query, call.key
    padded.query[:, :, 400:] = padded.key[:, :, 400:] = torch.nan
    assert padded.voters is not None
    padded.voters[:, 400:] = False
    padded = replace(padded, key_counts=padded.voters.float(), ends=torch.tensor([400, 400]))
    actual = exact_choice(padded, num_candidates)
    rows = call.num_rows
    assert torch.equal(actual.counts[:, :, :rows], expected.counts)
    assert torch.equal(actual.key_blocks[:, :, :rows], expected.key_blocks)
    assert not actual.counts[:, :, rows:].any()


def test_a_short_row_beside_a_long_one_is_searched_as_if_alone():
    call = make_call({"length": 600})
    alone = replace(call, query=call.query[1:, :, :200], key=call.key[1:, :, :200], length=200)
    alone = replace(alone, voters=None, key_counts=None, ends=None, global_positions=None)
    assert call.voters is not None
    call.voters[1, 200:] = False
    call = replace(call, key_counts=call.voters.float(), ends=torch.tensor([600, 200]))
    expected, actual = exact_choice(alone, 256), exact_choice(call, 256)
    for one, both in zip(expected[:4], actual[:4], strict=True):
        assert torch.equal(one[0], both[1, :, : one.shape[2]])


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("num_candidates", [64, 4096])
def test_select_blocks_asks_for_what_its_masks_say(num_candidates, is_causal):
    call = make_call({"length": 300, "masks": "both", "is_causal": is_causal})
    assert call.voters is not None and call.global_positions is not None
    is_global = torch.zeros(2, 301, dtype=torch.bool).scatter(1, call.global_positions, True)
    is_global = is_global[:, :300]
    selected = select_blocks(
        call.query,
        call.key,
        SlidingWindow(call.left),
        SelectionOptions(3, 16, 16, num_candidates=num_candidates),
        attention_mask=call.voters | is_global,
        global_mask=is_global,
        is_causal=is_causal,
    )
    expected = exact_choice(replace(call, right=call.left, key_counts=call.voters), num_candidates)
    assert (selected.counts > 0).any()
    for name in ("key_blocks", "counts", "mass", "covered"):
        assert torch.equal(getattr(selected, name), getattr(expected, name)), name


def test_blocks_for_all_queries_are_not_chosen_again():
    call = make_call({"length": 300, "window": (8, 8)})
    options = SelectionOptions(3, 16, 16, num_candidates=4096, num_global_blocks=2)
    directions = call.key[0, :1, 100].expand(4, -1) * 10
    window = SlidingWindow(8)
    selected = select_blocks(call.query, call.key, window, options, global_directions=directions)
    assert selected.global_open.any()
    shared = selected.global_blocks[:, :, None, None]  # [batch, heads, 1, 1, shared]
    is_used = torch.arange(3) < selected.counts[..., None]
    assert not ((selected.key_blocks[..., None] == shared).any(dim=-1) & is_used).any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_block_with_a_bad_key_counts_nowhere(value):
    call = make_call({"length": 200})
    call.key[0, 0, 50] = value
    for kind, choice in all_choices(call):
        compare(call, choice, kind)
        # Query heads 0 and 1 share the key head.
        assert not (choice.key_blocks[0, :2] == 3).any(), kind
        assert (choice.key_blocks[0, 2:] == 3).any() and (choice.counts[0, :2] == 3).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_query_lets_its_block_choose_nothing(value):
    call = make_call({"length": 200})
    call.query[1, 2, 70, 3] = value
    for kind, choice in all_choices(call):
        compare(call, choice, kind)
        assert int(choice.counts[1, 2, 4]) == 0 and (choice.counts != 0).sum() == 2 * 4 * 13 - 1


def test_equal_keys_choose_the_first_blocks():
    call = make_call({"length": 160, "window": (4, 4)})
    call.key[:] = 1.0
    for _, choice in all_choices(call):
        rows = torch.arange(10)
        expected = torch.tensor([0, 1, 2]).expand(2, 4, 10, -1)
        # The last of ten blocks are covered by no window of 4.
        assert torch.equal(choice.key_blocks.long(), expected)
        assert choice.mass.allclose(torch.tensor(0.1), atol=1e-3) and len(rows) == 10


@pytest.mark.parametrize("norm", [1e-4, 1e4, 1e12])
def test_keys_of_any_norm(norm):
    call = make_call({"length": 200, "head_dim": 64})
    call.key[:, :, 30:90] *= norm
    for kind, choice in all_choices(call):
        assert choice.share.isfinite().all() and choice.covered.isfinite().all()
        if norm == 1e-4:
            compare(call, choice, kind)
        if norm < 1e12:
            total = choice.share.sum(dim=-1)
            torch.testing.assert_close(total, torch.ones_like(total), atol=1e-3, rtol=0)


def test_sharp_scores_match_definition():
    """Scores from far below to far above those of the first block, in either order."""
    for factor in (1.0, -1.0):
        call = make_call({"length": 256, "head_dim": 16}, batch=1)
        call.query[:] = 1.0
        call.key[:] = (torch.arange(256) / 4 * factor)[:, None] + torch.randn(256, 1) * 0.01
        call = replace(call, scale=1.0)
        for name, choice in all_choices(call):
            compare(call, choice, name, tolerance=1e-4)
            assert (choice.key_blocks[..., 0] == (15 if factor > 0 else 0)).all()


def test_a_row_of_padding_and_one_token():
    for length in (1, 40):
        call = make_call({"length": length}, num_blocks=50)
        assert call.voters is not None
        call.voters[1] = False
        call = replace(call, key_counts=call.voters.float(), ends=torch.tensor([length, 0]))
        for kind, choice in all_choices(call):
            compare(call, choice, kind)
            assert not choice.counts[1].any() and not choice.covered[1].any()


def document(length, heads=4, head_dim=64, seed=0):
    """Queries and keys of a text: topics of several lengths, and outlying dimensions."""
    generator = torch.Generator().manual_seed(seed)
    topic = torch.zeros(heads, length, head_dim)
    for scale in (16, 64, 256):
        drawn = torch.randn(heads, -(-length // scale), head_dim, generator=generator)
        topic += drawn.repeat_interleave(scale, dim=1)[:, :length]
    noise = torch.randn(2, heads, length, head_dim, generator=generator)
    outlying = 1 + 4 * (torch.rand(head_dim, generator=generator) < 0.05)
    query = (noise[0] + 0.5 * topic) * outlying
    return query[None], ((topic + 0.5 * noise[1]) * outlying)[None]


@pytest.mark.parametrize("sizes", [(16, 16), (64, 64)])
def test_bytes_choose_nearly_what_floats_choose(sizes):
    skip_without_cpp_compiler()
    query, key = document(2048)
    call = ExactCall(query, key, 2048, 256, 256, 512 // sizes[1], sizes[1], sizes[0], scale=0.125)
    exact, rough = compiled_choice(call, False), compiled_choice(call, True)
    assert torch.equal(exact.counts, rough.counts)
    is_found = (exact.key_blocks[..., None] == rough.key_blocks[..., None, :]).any(dim=-1)
    assert is_found.float().mean() > 0.98


# What a build for another processor than this one takes: narrow vectors, bytes by other
# instructions.
BUILDS = {
    "portable": ("", ["-DVECTOR_FLOATS=4"]),
    "avx2": ("avx2", ["-march=haswell"]),
    "avx512": ("avx512bw", ["-march=skylake-avx512"]),
    "vnni": ("avx512_vnni", ["-march=cascadelake"]),
    "tiles": ("amx_int8", ["-march=sapphirerapids"]),
    "narrow_vnni": ("avx512_vnni", ["-march=cascadelake", "-DVECTOR_FLOATS=8"]),
}


@pytest.mark.parametrize("name", BUILDS)
def test_other_processors_match_definition(name, tmp_path):
    skip_without_cpp_compiler()
    needed, flags = BUILDS[name]
    is_here = platform.machine() == "x86_64" and needed in Path("/proc/cpuinfo").read_text()
    if needed and not is_here:
        pytest.skip(f"this processor has no {needed}")
    library, torch_libraries = tmp_path / "select.so", Path(torch.__file__).parent / "lib"
    subprocess.run(
        [os.environ.get("CXX", "c++"), "-O1", "-std=c++17", "-fPIC", "-shared", "-w", *flags,
         str(SOURCES / "cpu" / "select.cpp"), f"-L{torch_libraries}", "-ltorch_cpu", "-lc10",
         "-o", str(library)],
        check=True,
    )  # fmt: skip
    with use_library("cpu", ctypes.CDLL(str(library))):
        for sizes, head_dim in (((16, 16), 20), ((64, 24), 80)):
            call = make_call({"length": 203, "sizes": sizes, "masks": "both", "head_dim": head_dim})
            compare(call, best_first(call, False), "floats")
            compare(call, best_first(as_bytes(call), True), "bytes")
