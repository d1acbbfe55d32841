import functools
from dataclasses import replace

import pytest
import torch
from calls import pairwise, readable
from selection_calls import compare, make_call, stages_of
from triton_on_cpu import compile_only, needs_triton, resources

from adaptive_longformer.selection.exact import torch_choice
from adaptive_longformer.selection.exact_call import ExactCall

triton_select = pytest.importorskip("adaptive_longformer.selection.triton_select", reason="Triton")
pytestmark = needs_triton

# bfloat16 is missing: products of its matrices are wrong in Triton's interpreter.
GRID = {
    "dtype": [torch.float32, torch.float16],
    "is_causal": [False, True],
    "masks": ["none", "right", "holes", "global", "both"],
    "sizes": [(16, 16), (16, 64), (64, 16), (32, 24), (8, 32)],
    "length": [1, 31, 64, 90],
    "window": [(8, 8), (20, 12), (1000, 1000)],
    "key_heads": [1, 2],
    "head_dim": [6, 16],
    "shared": [False, True],
}
MODULE = "adaptive_longformer.selection.triton_select"


@pytest.fixture
def interpreted(triton_interpreter):
    return functools.partial(triton_interpreter, MODULE, "triton_choice")


def check(call, actual):
    """Against PyTorch in float64, whose masses and choices the definition knows."""
    scale = torch.tensor(call.scale, dtype=torch.float32).item()
    as_double = replace(call, query=call.query.double(), key=call.key.double(), scale=scale)
    expected = torch_choice(as_double, with_dropped=True)
    assert torch.equal(actual.counts, expected.counts)
    for name in ("mass", "covered"):
        difference = getattr(actual, name) - getattr(expected, name)
        assert not difference.numel() or float(difference.abs().max()) < 2e-6, name
    assert torch.equal(actual.key_blocks, expected.key_blocks)
    dropped = expected.log_dropped
    is_large = dropped > -20.0  # of less nothing may be left in float32
    torch.testing.assert_close(
        actual.log_dropped[is_large].double(), dropped[is_large], atol=1e-4, rtol=1e-5
    )
    assert (actual.log_dropped[dropped == -torch.inf] == -torch.inf).all()


@pytest.mark.parametrize("options", pairwise(GRID), ids=readable)
def test_choices_are_those_of_torch(options, interpreted):
    call = make_call(options, heads=2)
    check(call, interpreted(call, with_dropped=True))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("sizes", [(16, 16), (32, 24), (64, 128)])
def test_every_stage_chooses_what_torch_does(sizes, is_causal, interpreted):
    options = {"sizes": sizes, "masks": "both", "is_causal": is_causal, "key_heads": 1}
    call = make_call(options | {"length": 300}, batch=1, heads=1)
    calls = stages_of(call, num_candidates=64)
    assert [call.places is not None for call in calls] == [False, True]
    for call in calls:
        check(call, interpreted(call, with_dropped=True))


def test_all_masses_are_as_defined(interpreted):
    call = make_call({"length": 90, "masks": "both", "shared": True}, num_blocks=8)
    choice = interpreted(call)
    share = torch.zeros(*choice.counts.shape, call.num_key_blocks)
    share.scatter_add_(-1, choice.key_blocks.long(), choice.mass)
    compare(call, choice._replace(share=share), "triton")


def test_the_last_queries_choose_what_all_of_them_do(interpreted):
    """As in cached decoding: those of the block before, and the first of the block."""
    options = {"is_causal": True, "length": 300, "key_heads": 1}
    for call in stages_of(make_call(options, batch=1, heads=1), num_candidates=64):
        size, row = call.query_block_size, 300 // call.query_block_size
        start = (row - 1) * size
        assert call.voters is not None
        last = replace(call, query=call.query[:, :, start:])
        if call.places is not None:
            places = call.places
            last = replace(
                last,
                places=places._replace(
                    numbers=places.numbers[:, :, row - 1 :],
                    counts=places.counts[:, :, row - 1 :],
                    log_rest=places.log_rest[:, :, start:],
                ),
            )
        expected, actual = interpreted(call), interpreted(last)
        for name in ("key_blocks", "counts", "mass", "covered"):
            assert torch.equal(getattr(actual, name)[:, :, 1], getattr(expected, name)[:, :, row])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_never_chosen(value, interpreted):
    call = make_call({"length": 90, "masks": "global"}, batch=1)
    call.key[0, 0, 65] = value  # an ordinary one
    call.key[0, 1, 45] = value  # a global one
    call.query[0, 2, 20, 3] = value
    choice = interpreted(call, with_dropped=True)
    expected = torch_choice(call, with_dropped=True)
    for one, other in zip(choice, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert not choice.counts[0, 2, 1] and not (choice.key_blocks[0, 0] == 4).any()


def test_equal_masses_choose_the_first_blocks(interpreted):
    call = make_call({"length": 90, "window": (0, 0)}, batch=1, heads=2)
    call.key[:] = 1.0
    choice = interpreted(call)
    is_last = choice.mass[..., 0] != choice.mass[..., 1]
    assert not is_last.any()
    assert torch.equal(choice.key_blocks.long(), torch.arange(3).expand(1, 2, 6, -1))


def test_the_same_call_chooses_the_same_bits(interpreted):
    call = make_call({"length": 64, "masks": "both"})
    first, second = (interpreted(call, with_dropped=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("is_causal", [False, True])
def test_heads_may_choose_one_after_the_other(is_causal, interpreted):
    options = {"length": 300, "masks": "both", "is_causal": is_causal}
    for call in stages_of(make_call(options, heads=2), num_candidates=64):
        together = interpreted(call, with_dropped=True)
        most_masses = 3 * call.num_rows * call.num_key_blocks
        for most in (1, most_masses):
            apart = interpreted(call, with_dropped=True, most_masses=most)
            assert all(torch.equal(one, other) for one, other in zip(apart, together, strict=True))


def test_odd_views_are_read_where_they_are(interpreted):
    call = make_call({"length": 64, "head_dim": 16}, batch=2, heads=2)
    padded = torch.zeros(2, 64, 2, 20)
    padded[..., :16] = call.query.transpose(1, 2)
    key = call.key.transpose(2, 3).contiguous().transpose(2, 3)
    view = replace(call, query=padded.transpose(1, 2)[..., :16], key=key)
    for one, other in zip(interpreted(view), interpreted(call), strict=True):
        assert torch.equal(one, other)


def test_few_calls_are_not_taken(interpreted):
    """Candidates that fill no registers; and float64, in which PyTorch computes."""
    call = make_call({"length": 64})
    query, key = torch.zeros(2, 1, 1, 4 * 16384 + 1, 4).unbind()
    long = ExactCall(query, key, query.shape[2], 8, 8, 3, 4, 4)
    assert triton_select.can_choose(call) and not triton_select.can_choose(long)
    assert not triton_select.can_choose(
        replace(call, query=call.query.double(), key=call.key.double())
    )


# Capability, whether causal, and whether there are places: 64 queries in a tile, but with places,
# of which every query block has its own, those of one block.
COMPILED = {
    "sm80": (80, False, True),
    "sm90": (90, False, True),
    "sm90-causal": (90, True, True),
    "sm90-coarse": (90, False, False),
    "sm120": (120, False, True),
}


@pytest.mark.parametrize("capability, is_causal, has_places", COMPILED.values(), ids=COMPILED)
def test_kernels_compile_without_spills(capability, is_causal, has_places):
    options = {"is_causal": is_causal, "length": 1000, "masks": "both", "head_dim": 64}
    options["dtype"] = torch.bfloat16
    call = replace(make_call(options, batch=1), sampling_seed=1 if capability == 90 else -1)
    coarse, fine = stages_of(call, num_candidates=64)
    with compile_only(capability) as compiled:
        triton_select.triton_choice(fine if has_places else coarse, with_dropped=not has_places)
    assert len(compiled) == 3 + (not has_places)
    for name, kernel in compiled:
        registers, spilled = resources(kernel)
        assert registers < 255 and spilled == 0, name
        if name in ("masses_kernel", "dropped_kernel"):
            is_wgmma = "wgmma.mma_async" in kernel.asm["ptx"]
            assert is_wgmma == (capability == 90 and not has_places)
            assert is_wgmma or "mma.sync" in kernel.asm["ptx"]
