"""The Triton kernels in Triton's interpreter equal the definition, and they compile for GPUs.

bfloat16 is only compiled: the interpreter gets its products wrong (triton#11584).
"""

from dataclasses import replace

import pytest
import torch
from calls import (
    assert_backend_matches,
    check_operator,
    pairwise,
    random_call,
    readable,
    routed_layout,
    value_and_gradients,
)
from triton_on_cpu import compile_only, interpreter, needs_triton, resources, skip_without_loops

from adaptive_longformer.attention import explain_backends, sparse_attention
from adaptive_longformer.attention.backends import triton as backend
from adaptive_longformer.attention.call import make_call
from adaptive_longformer.attention.reference import reference_attention
from adaptive_longformer.patterns import EntryFlag, RandomBlocks, SlidingWindow

# Of the largest number, see `assert_backend_matches`.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3}
OPTIONS = {
    "blocks": [(64, 64), (16, 16), (32, 128), (128, 32)],
    "padding": [None, "left", "all"],
    "global_tokens": [None, "few"],
    "is_causal": [False, True],
    "dropout_p": [0.0, 0.2],
    "entry_bias": [False, True],
    "span": [False, True],
    "dtype": [torch.float32, torch.float16],
    "length": [65, 80],
}
CALL = {"dtype": torch.float32, "batch": 1, "heads": 1, "head_dim": 16}


@pytest.fixture(scope="module")
def interpreted():
    """Calls a function of this file where Triton interprets."""
    skip_without_loops()
    with interpreter() as call:
        yield lambda function, *arguments, **options: call(
            "test_triton", function.__name__, *arguments, **options
        )


def check(pattern, *, tolerance=1e-5, part_tiles=1, **options):
    """Against the definition, with columns of the transposed lists in parts of so many tiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "_PART_TILES", part_tiles)
        assert_backend_matches(pattern, "triton", tolerance=tolerance, **CALL | options)


@needs_triton
@pytest.mark.parametrize("options", pairwise(OPTIONS), ids=readable)
def test_features_match_reference(options, interpreted):
    layout = routed_layout(options["length"], *options.pop("blocks"), batch=2)
    if not options["entry_bias"]:
        layout = replace(layout, bias=None)
    interpreted(check, layout, batch=2, tolerance=TOLERANCE[options["dtype"]], **options)


@needs_triton
@pytest.mark.parametrize("blocks", [(64, 64), (16, 16)], ids=str)
def test_blocks_that_everyone_reads(blocks, interpreted):
    """Lists that differ by head, with a column that is computed in parts."""
    layout = routed_layout(200, *blocks, heads=2, window=SlidingWindow(1))
    is_read = (layout.flags == EntryFlag.SELECTED) & (layout.key_blocks % 2 == 0)
    layout = replace(layout, flags=layout.flags.where(layout.flags != EntryFlag.SELECTED, 0))
    shape = (*layout.counts.shape, 1)
    selected = torch.full(shape, int(EntryFlag.SELECTED), dtype=torch.int32)
    first = torch.zeros(shape, dtype=torch.int32)
    keep = torch.cat([torch.ones_like(first, dtype=torch.bool), (layout.flags != 0) | is_read], -1)
    layout = replace(
        layout,
        key_blocks=torch.cat([first, layout.key_blocks], dim=-1),
        flags=torch.cat([selected, layout.flags], dim=-1),
        counts=layout.counts + 1,
        bias=None,
    ).select(keep & (torch.cat([selected, layout.flags], dim=-1) != 0))
    interpreted(check, layout, heads=2, length=200)


@needs_triton
def test_patterns_with_odd_head_dim_and_fewer_key_heads(interpreted):
    for pattern in (SlidingWindow(20, 3), SlidingWindow(9) | RandomBlocks(1)):
        for _ in range(2):  # the lists of a pattern are kept
            interpreted(check, pattern, heads=2, key_heads=1, head_dim=24, length=100)


@needs_triton
def test_many_global_tokens(interpreted):
    interpreted(
        check, SlidingWindow(5), length=136, global_tokens="many", global_qkv="explicit",
        padding="right", dropout_p=0.1,
    )  # fmt: skip


def lists_of_nothing(layout):
    layout = replace(layout, counts=torch.zeros_like(layout.counts), window=None, bias=None)
    for lists in (layout, layout.select(layout.used)):
        call = random_call(lists, length=layout.length, **CALL)
        output, lse, *grads = value_and_gradients(lists, *call, "triton")
        assert output.eq(0).all() and lse.eq(-1).all()
        assert all(grad.eq(0).all() for grad in grads)


@needs_triton
def test_lists_of_nothing_give_zeros(interpreted):
    interpreted(lists_of_nothing, routed_layout(70, 16, 16))


def empty_tensors(shape):
    query = torch.randn(shape, requires_grad=True)
    output = sparse_attention(query, query, query, SlidingWindow(3), backend="triton")
    (grad,) = torch.autograd.grad(output.sum(), query)
    assert output.shape == grad.shape == shape


@needs_triton
@pytest.mark.parametrize("shape", [(0, 2, 12, 16), (2, 2, 0, 16)], ids=["batch", "length"])
def test_empty_tensors_give_empty_results(shape, interpreted):
    interpreted(empty_tensors, shape)


def garbage_in_padding(layout, garbage):
    """The kernels alone: `sparse_attention` takes out what is not finite on a CPU."""
    results = []
    for is_dirty in (False, True):
        tensors, options, _ = random_call(
            layout, length=layout.length, padding="left", global_tokens="few", **CALL
        )
        padding = ~options["attention_mask"]
        for tensor in tensors if is_dirty else ():
            tensor.data.transpose(1, 2)[padding] = garbage
        output, lse = backend.run_triton(make_call(*tensors, layout, **options))
        output = output.masked_fill(padding[:, None, :, None], 0.0)
        grads = torch.autograd.grad(output.square().sum(), tensors)
        results.append([output, lse.masked_fill(padding[:, None], 0.0), *grads])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


@needs_triton
@pytest.mark.parametrize("garbage", [float("nan"), float("inf")], ids=str)
def test_padding_may_hold_anything(garbage, interpreted):
    interpreted(garbage_in_padding, replace(routed_layout(70, 16, 16), bias=None), garbage)


def same_call_twice(layout):
    call = random_call(layout, length=layout.length, entry_bias=True, **CALL)
    first, second = (value_and_gradients(layout, *call, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_triton
def test_the_same_call_twice_gives_the_same_bits(interpreted):
    interpreted(same_call_twice, routed_layout(70, 16, 16))


def odd_strides_and_scale():
    query, key, value = torch.randn(1, 40, 16, 3, 2).permute(3, 0, 4, 1, 2)
    call = make_call(query, key, value, SlidingWindow(6), scale=-0.7)
    for actual, expected in zip(backend.run_triton(call), reference_attention(call), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@needs_triton
def test_any_strides_and_scale(interpreted):
    interpreted(odd_strides_and_scale)


def opcheck(layout):
    tensors, options, _ = random_call(
        layout, length=layout.length, span=True, entry_bias=True, padding="left", **CALL
    )
    check_operator(backend.triton_attention, make_call(*tensors, layout, **options))


@needs_triton
def test_opcheck(interpreted):
    interpreted(opcheck, routed_layout(20, 16, 16))


# Capability, and query and key blocks. At 16 a tile is put together of four query blocks.
COMPILED = [
    (90, 16, 16),
    pytest.param(90, 64, 64, marks=pytest.mark.slow),
    pytest.param(80, 16, 16, marks=pytest.mark.slow),
    pytest.param(120, 64, 64, marks=pytest.mark.slow),
    pytest.param(90, 32, 128, marks=pytest.mark.slow),
]
# Kernels whose tiles have 64 rows with key blocks of any size.
WGMMA = ("attention_forward", "grad_queries", "grad_keys", "grad_packed_parts")


@needs_triton
@pytest.mark.parametrize(("capability", "query_block", "key_block"), COMPILED)
def test_kernels_compile(capability, query_block, key_block):
    """At head_dim 64 without spills, and with Hopper's products of matrices."""
    layout = replace(routed_layout(4096, query_block, key_block), bias=None)
    tensors, options, _ = random_call(
        layout, length=4096, padding="left", global_tokens="few", **CALL | {
            "head_dim": 64, "dtype": torch.bfloat16,
        },
    )  # fmt: skip
    call = make_call(*tensors, layout, **options)
    with compile_only(capability) as compiled:
        output, lse = backend.forward(call)
        backend.backward(output, lse, output, lse, call)
    names = [name for name, _ in compiled]
    assert len(names) == 2 + 8, names  # launches of the forward and the backward pass
    # Bytes per thread. Without Hopper's products the operands are in registers too.
    most_spilled = 128 if capability == 120 or key_block == 128 else 0
    for name, kernel in compiled:
        registers, spilled = resources(kernel)
        assert spilled <= most_spilled, (name, registers, spilled)
        has_wgmma = name in WGMMA or (name == "grad_list_parts" and key_block >= 64)
        is_hopper = capability == 90
        assert ("wgmma.mma_async" in kernel.asm["ptx"]) == (is_hopper and has_wgmma), name


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, "tensors are on cpu, the kernels are for CUDA devices"),
        ({"dtype": torch.float64}, "tensors are on cpu"),
    ],
)
def test_a_named_backend_says_why_it_cannot_run(change, reason):
    tensors, options, _ = random_call(SlidingWindow(5), **CALL | change)
    assert explain_backends(*tensors, SlidingWindow(5), **options)["triton"].startswith(reason)
    with pytest.raises(ValueError, match=f"'triton' cannot run this call: {reason}"):
        sparse_attention(*tensors, SlidingWindow(5), backend="triton", **options)


@pytest.mark.parametrize(
    ("options", "blocks", "reason"),
    [
        ({"dtype": torch.float64}, (64, 64), "torch.float64 is not one of"),
        ({"head_dim": 20}, (64, 64), "head_dim 20 is not a multiple of 8 from 16 to 128"),
        ({"head_dim": 136}, (64, 64), "head_dim 136 is not"),
        ({}, (8, 64), r"blocks of 8 x 64 tokens, each of \(16, 32, 64, 128\) is needed"),
        ({}, (64, 24), "blocks of 64 x 24 tokens"),
    ],
    ids=str,
)
def test_what_the_kernels_do_not_take(options, blocks, reason, monkeypatch):
    monkeypatch.setattr(backend, "_INTERPRETS", True)
    layout = routed_layout(70, *blocks)
    tensors, arguments, _ = random_call(layout, length=70, **CALL | options)
    with pytest.raises(ValueError, match=reason):
        sparse_attention(*tensors, layout, backend="triton", **arguments)


def in_one_graph(layout):
    tensors, options, _ = random_call(layout, length=layout.length, **CALL)

    def run(*tensors):
        return sparse_attention(*tensors, layout, backend="triton", **options)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), run(*tensors))


@needs_triton
def test_torch_compile_sees_one_operator(interpreted):
    interpreted(in_one_graph, routed_layout(20, 16, 16))
