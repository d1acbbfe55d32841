"""The compiled CPU kernel equals the definition, in value and in gradient."""

import ctypes
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calls import check_operator, skip_without_cpp_compiler
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adaptive_longformer.attention import AttentionSpan, explain_backends, sparse_attention
from adaptive_longformer.attention.backends.compiled import compiled_attention, run_compiled
from adaptive_longformer.attention.backends.cpp import CpuArguments
from adaptive_longformer.attention.call import make_call
from adaptive_longformer.attention.kernels.build import SOURCES
from adaptive_longformer.attention.kernels.load import kernel_library
from adaptive_longformer.patterns import (
    BlockLayout,
    EntryFlag,
    Fixed,
    Full,
    GlobalTokens,
    RandomBlocks,
    SlidingWindow,
    block_layout,
)
from adaptive_longformer.patterns.block_layout import window_layout
from adaptive_longformer.testing import use_library

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SEED = torch.tensor(-987654321012345)


@pytest.fixture(scope="module", autouse=True)
def _kernel():
    skip_without_cpp_compiler()


def random_layout(length, window, batch=1, heads=1, query_block=64, key_block=64, seed=0):
    """A window plus random SELECTED entries, some on blocks of the window's edge; some rows are
    empty.
    """
    generator = torch.Generator().manual_seed(seed)
    base = block_layout(
        window or SlidingWindow(0), length, query_block_size=query_block, key_block_size=key_block
    )
    shape = (batch, heads, base.num_query_blocks, base.num_key_blocks)
    routed = torch.rand(shape, generator=generator) < 0.4
    flags = torch.where(routed, int(EntryFlag.SELECTED), 0).int()
    blocks = torch.arange(base.num_key_blocks, dtype=torch.int32).expand(shape)
    if window is not None:
        used = base.used.expand(*shape[:3], -1)
        flags = torch.cat([base.flags.expand_as(used).where(used, 0), flags], dim=-1)
        blocks = torch.cat([base.key_blocks.expand_as(used), blocks], dim=-1)
    counts = torch.full(shape[:3], blocks.shape[-1], dtype=torch.int32)
    layout = replace(base, key_blocks=blocks, flags=flags, counts=counts, window=window)
    layout = layout.select(flags != 0)
    layout.validate()
    return layout


def masks(batch, length):
    """Padding at both ends of different rows, and global tokens, some of them in the padding."""
    position = torch.arange(length)
    row = torch.arange(batch)[:, None]
    attention_mask = (position >= row * (length // 4)) & (position < length - (row + 1) % 2 * 3)
    global_mask = (position % 41 == row * 3) & (position < length // 2)
    return attention_mask, global_mask


def compare(pattern, batch, heads, length, head_dim, dtype=torch.float32, **options):
    """Runs kernel and float64 reference on the same numbers; compares outputs and gradients."""
    generator = torch.Generator().manual_seed(length)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    inputs = {
        name: draw(batch, length, heads, head_dim).transpose(1, 2)
        for name in ("query", "key", "value")
    }
    if options.pop("with_bias", False):
        shape = pattern.key_blocks.shape
        inputs["entry_bias"] = draw(1, heads, *shape[2:]).float()
    span = options.pop("span", None)
    if span is not None:
        inputs["span"] = torch.linspace(0.0, span, heads)
    grad_output, grad_lse = draw(batch, heads, length, head_dim), draw(batch, heads, length)
    results = {}
    for backend, kind in (("reference", torch.float64), ("cpp", None)):
        leaves = {
            name: tensor.to(kind or tensor.dtype).clone().requires_grad_()
            for name, tensor in inputs.items()
        }
        arguments = dict(leaves)
        if span is not None:
            arguments["span"] = AttentionSpan(arguments["span"], 7.5)
        tensors = [arguments.pop(name) for name in ("query", "key", "value")]
        output, lse = sparse_attention(
            *tensors, pattern, return_lse=True, backend=backend, **arguments, **options
        )
        is_empty = lse == -torch.inf
        assert (output[is_empty] == 0).all()
        loss = (output * grad_output).sum() + (lse.masked_fill(is_empty, 0.0) * grad_lse).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()))
        results[backend] = dict(
            zip(leaves, grads), output=output, lse=lse.masked_fill(is_empty, 0.0), empty=is_empty
        )
    for name, expected in results["reference"].items():
        actual = results["cpp"][name]
        assert actual.shape == expected.shape
        if expected.numel() == 0:
            continue
        difference = (actual.double() - expected.double()).abs().max()
        scale = max(1.0, expected.double().abs().max().item())
        assert difference <= TOLERANCE[dtype] * scale, f"{name}: {difference} of {scale}"


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 331])
@pytest.mark.parametrize("is_causal", [False, True], ids=["both_ways", "causal"])
@pytest.mark.parametrize(
    "pattern",
    [SlidingWindow(70), SlidingWindow(0, 100), Full(), SlidingWindow(30) | RandomBlocks(2, 64)],
    ids=["window", "one_sided", "full", "random_blocks"],
)
def test_patterns_match_reference(pattern, length, is_causal):
    attention_mask, global_mask = masks(2, length)
    compare(
        pattern,
        2,
        3,
        length,
        40,
        attention_mask=attention_mask,
        global_mask=global_mask,
        is_causal=is_causal,
        dropout_p=0.3,
        dropout_seed=SEED,
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_dim", [8, 32, 64, 80, 96, 128, 136])
def test_types_and_head_dims_match_reference(dtype, head_dim):
    compare(SlidingWindow(50) | GlobalTokens((0, 77)), 1, 2, 131, head_dim, dtype)


def compare_sizes(query_block, key_block, window, length=331):
    """Lists of neighbours that agree here and there, by head; bias, padding, global tokens and the
    span; then dropout and causality too, under which query blocks are computed alone.
    """
    layout = random_layout(length, window, 2, 3, query_block, key_block)
    attention_mask, global_mask = masks(2, length)
    options = {"attention_mask": attention_mask, "global_mask": global_mask, "with_bias": True}
    if window is not None:
        options["span"] = 50.0
    compare(layout, 2, 3, length, 24, **options)
    options |= {"dropout_p": 0.1, "dropout_seed": SEED}
    compare(layout, 2, 3, length, 24, is_causal=True, **options)


@pytest.mark.parametrize("window", [None, SlidingWindow(60, 45)], ids=["routed", "window"])
@pytest.mark.parametrize("key_block", [8, 16, 32, 40, 64, 128])
@pytest.mark.parametrize("query_block", [8, 16, 24, 32, 64, 128])
def test_blocks_of_every_size_match_reference(query_block, key_block, window):
    compare_sizes(query_block, key_block, window)


# What is wrong: the file, what stands there, what the mutant has instead.
MUTANTS = {
    "bias of another query block": (
        "bundle.h",
        "place = entry.places[member]",
        "place = entry.places[0]",
    ),
    "gradient of the bias of another query block": (
        "backward.cpp",
        "entry.places[member]] =",
        "entry.places[0]] =",
    ),
    "bias of another key block": (
        "forward.cpp",
        "bundle.bias(*tile.entries[part], member)",
        "bundle.bias(*tile.entries[0], member)",
    ),
    "shared by a query block that does not list it": (
        "bundle.h",
        " || entries_[latest].first_member + entries_[latest].num_members != member",
        "",
    ),
    "window and chosen entries as one": (
        "bundle.h",
        "latest_[2 * block + is_window]",
        "latest_[2 * block]",
    ),
    "mask of another query block": ("bundle.h", "position(tile.first_lane + i)", "position(i)"),
    "sums of another query block": (
        "bundle.h",
        "tile.first_lane = first_lane(first.first_member)",
        "tile.first_lane = 0",
    ),
    "slope of the span of another query block": (
        "backward.cpp",
        "bundle.position(lane)",
        "bundle.position(i)",
    ),
    "dropout of another key block": (
        "forward.cpp",
        "key_words(bundle.batch, tile.entries[part]->block)",
        "key_words(bundle.batch, tile.entries[0]->block)",
    ),
    "values of another key block": (
        "forward.cpp",
        "values + entry.block * block_size",
        "values + tile.entries[0]->block * block_size",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS)
def test_wrong_kernels_differ_from_reference(mutant, tmp_path):
    """What `compare_sizes` is worth: it fails for mistakes that packing invites."""
    file, right, wrong = MUTANTS[mutant]
    for path in (SOURCES / "cpu").iterdir():
        text = path.read_text()
        if path.name == file:
            assert text.count(right) == 1
            text = text.replace(right, wrong)
        if path.suffix == ".h" or path.stem in ("forward", "backward"):
            (tmp_path / path.name).write_text(text)
    library = build(tmp_path / "kernel.so", tmp_path)
    with use_library("cpu", library), pytest.raises(AssertionError, match=" of "):
        compare_sizes(16, 16, SlidingWindow(60, 45), length=203)


@pytest.mark.parametrize("longest", [0.0, 40.0, 200.0])
def test_adaptive_span_matches_reference(longest):
    layout = random_layout(203, SlidingWindow(60, 45), heads=3)
    compare(layout, 2, 3, 203, 16, span=longest, with_bias=True)
    compare(SlidingWindow(60, 45), 2, 3, 203, 16, span=longest, is_causal=True)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    length=st.integers(1, 150),
    window=st.none() | st.builds(SlidingWindow, st.integers(0, 90), st.integers(0, 90)),
    query_block=st.integers(8, 70),
    key_block=st.integers(8, 70),
    per_head=st.booleans(),
    is_causal=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_layout_matches_reference(
    length, window, query_block, key_block, per_head, is_causal, seed
):
    heads = 2 if per_head else 1
    layout = random_layout(length, window, 1, heads, query_block, key_block, seed)
    attention_mask, global_mask = masks(2, length)
    compare(
        layout,
        2,
        2,
        length,
        16,
        attention_mask=attention_mask,
        global_mask=global_mask,
        is_causal=is_causal,
        with_bias=True,
    )


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_any_number_of_threads_matches_reference(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compare(random_layout(500, SlidingWindow(90)), 1, 3, 500, 16, with_bias=True)
    finally:
        torch.set_num_threads(before)


def build(library, sources, *options):
    """The kernels of a folder, quickly compiled."""
    torch_libraries = Path(torch.__file__).parent / "lib"
    subprocess.run(
        [os.environ.get("CXX", "c++"), "-O1", "-std=c++17", "-fPIC", "-shared", "-Wno-psabi",
         *options, *map(str, sources.glob("*.cpp")), f"-L{torch_libraries}", "-ltorch_cpu",
         "-lc10", "-o", str(library)],
        check=True,
    )  # fmt: skip
    return ctypes.CDLL(str(library))


@pytest.mark.parametrize("floats,options", [(4, []), (16, ["-march=native"])], ids=["4", "16"])
def test_other_vector_widths_match_reference(floats, options, tmp_path):
    """What a machine without AVX or with AVX-512 would build; the compiler splits wide vectors."""
    library = build(tmp_path / "kernel.so", SOURCES / "cpu", f"-DVECTOR_FLOATS={floats}", *options)
    layout = random_layout(203, SlidingWindow(60, 45), heads=3)
    options = {"dropout_p": 0.1, "dropout_seed": SEED}
    with use_library("cpu", library):
        compare(layout, 2, 3, 203, 24, span=40.0, with_bias=True, **options)
        compare(layout, 2, 3, 203, 24, torch.bfloat16, is_causal=True, **options)
        compare_sizes(24, 16, SlidingWindow(60, 45))


def run_once(pattern, heads=3, **options):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 300, 16, requires_grad=True) for _ in range(3))
    output = sparse_attention(query, key, value, pattern, backend="cpp", **options)
    return [output, *torch.autograd.grad(output.square().sum(), (query, key, value))]


def test_results_are_bitwise_reproducible():
    first = run_once(SlidingWindow(60), dropout_p=0.2, dropout_seed=SEED)
    for _ in range(5):
        again = run_once(SlidingWindow(60), dropout_p=0.2, dropout_seed=SEED)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("query_block,key_block", [(16, 16), (64, 32)])
def test_two_threads_give_the_bits_of_one(query_block, key_block, heads):
    layout = random_layout(300, SlidingWindow(60), 1, heads, query_block, key_block)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(run_once(layout, heads, dropout_p=0.2, dropout_seed=SEED))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results))


def test_other_strides_give_the_same_result():
    torch.manual_seed(0)
    plain = [torch.randn(2, 3, 100, 16) for _ in range(3)]
    expected = sparse_attention(*plain, SlidingWindow(20), backend="cpp")
    for permuted in (
        [tensor.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0) for tensor in plain],
        [torch.cat([tensor, tensor], dim=-1)[..., :16] for tensor in plain],
        [tensor[..., None].expand(-1, -1, -1, -1, 2)[..., 1] for tensor in plain],
    ):
        assert torch.equal(sparse_attention(*permuted, SlidingWindow(20), backend="cpp"), expected)


def test_grouped_queries_match_repeated_heads():
    torch.manual_seed(0)
    query = torch.randn(1, 6, 90, 16)
    key, value = torch.randn(1, 2, 90, 16), torch.randn(1, 2, 90, 16)
    repeated = (tensor.repeat_interleave(3, dim=1) for tensor in (key, value))
    assert torch.equal(
        sparse_attention(query, key, value, SlidingWindow(20), backend="cpp"),
        sparse_attention(query, *repeated, SlidingWindow(20), backend="cpp"),
    )


@pytest.mark.parametrize("shape", [(0, 2, 64, 16), (2, 2, 0, 16)], ids=["batch", "length"])
def test_empty_tensors_give_empty_results(shape):
    query, key, value = (torch.zeros(shape, requires_grad=True) for _ in range(3))
    layout = BlockLayout(
        key_blocks=torch.zeros(1, 1, -(-shape[2] // 64), 1, dtype=torch.int32),
        counts=torch.ones(1, 1, -(-shape[2] // 64), dtype=torch.int32),
        flags=torch.full((1, 1, -(-shape[2] // 64), 1), int(EntryFlag.SELECTED), dtype=torch.int32),
        query_block_size=64,
        key_block_size=64,
        length=shape[2],
    )
    output = sparse_attention(query, key, value, layout, backend="cpp")
    output.sum().backward()
    assert output.shape == shape and query.grad is not None and query.grad.shape == shape


def test_nan_in_padding_does_not_leak():
    torch.manual_seed(0)
    tensors = [torch.randn(1, 2, 150, 16) for _ in range(3)]
    mask = torch.ones(1, 150, dtype=torch.bool)
    mask[:, 70:110] = False
    poisoned = [tensor.masked_fill(~mask[:, None, :, None], torch.nan) for tensor in tensors]
    results = []
    for inputs in (tensors, poisoned):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        output = sparse_attention(*leaves, SlidingWindow(30), attention_mask=mask, backend="cpp")
        output[:, :, mask[0]].square().sum().backward()
        results.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for clean, dirty in zip(*results):
        assert torch.equal(clean[:, :, mask[0]], dirty[:, :, mask[0]])


def test_layout_with_ids_out_of_range_is_an_error():
    """The kernel checks again, where a compiled graph has no other check."""
    query = torch.randn(1, 1, 128, 16)
    layout = block_layout(SlidingWindow(10), 128)
    call = make_call(query, query, query, layout)
    wrong = replace(layout, key_blocks=layout.key_blocks + 1)
    with pytest.raises(ValueError, match="out of range"):
        run_compiled(replace(call, layout=wrong))


def test_unsupported_calls_have_a_reason():
    query = torch.randn(1, 1, 128, 16)
    for pattern in (SlidingWindow(4, dilation=2), Fixed(16), RandomBlocks(1, 48)):
        reason = explain_backends(query, query, query, pattern)["cpp"]
        assert reason is not None and "whole blocks" in reason
    reason = explain_backends(*[query.double()] * 3, SlidingWindow(4))["cpp"]
    assert reason is not None and "float64" in reason
    reason = explain_backends(query, query, query, SlidingWindow(4))["cuda"]
    assert reason == "tensors are on cpu, the kernel is for CUDA devices"


def test_argument_struct_has_the_size_of_the_library():
    assert kernel_library("cpu").adaptive_attention_arguments_size() == ctypes.sizeof(CpuArguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operator_passes_opcheck(dtype):
    torch.manual_seed(0)
    tensors = [torch.randn(1, 2, 70, 16, dtype=dtype, requires_grad=True) for _ in range(3)]
    layout = random_layout(70, SlidingWindow(20), query_block=16, key_block=16)
    bias = torch.randn(1, 2, *layout.key_blocks.shape[2:], requires_grad=True)
    span = AttentionSpan(torch.tensor([5.0, 12.0], requires_grad=True), 8.0)
    attention_mask, global_mask = masks(1, 70)
    call = make_call(
        *tensors, layout, entry_bias=bias, span=span, attention_mask=attention_mask,
        global_mask=global_mask, dropout_p=0.1, dropout_seed=SEED,
    )  # fmt: skip
    check_operator(compiled_attention, call)


def test_compiles_as_one_graph():
    def attend(query, key, value, seed):
        return sparse_attention(
            query,
            key,
            value,
            SlidingWindow(60) | GlobalTokens((0,)),
            dropout_p=0.1,
            dropout_seed=seed,
            backend="cpp",
        )

    torch.manual_seed(0)
    inputs = [torch.randn(1, 2, 200, 16, requires_grad=True) for _ in range(3)]
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    expected, actual = attend(*inputs, SEED), compiled(*inputs, SEED)
    assert torch.equal(actual, expected)
    for a, b in zip(
        torch.autograd.grad(actual.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)
    ):
        assert torch.equal(a, b)


def test_checkpointing_recomputes_the_same_gradients():
    torch.manual_seed(0)
    inputs = [torch.randn(1, 2, 150, 16, requires_grad=True) for _ in range(3)]

    def attend(*tensors):
        return sparse_attention(
            *tensors, SlidingWindow(30), dropout_p=0.5, dropout_seed=SEED, backend="cpp"
        )

    plain = torch.autograd.grad(attend(*inputs).square().sum(), inputs)
    output = torch.utils.checkpoint.checkpoint(attend, *inputs, use_reentrant=False)
    assert all(
        torch.equal(a, b) for a, b in zip(plain, torch.autograd.grad(output.square().sum(), inputs))
    )


def test_every_head_may_list_another_part_of_the_window():
    # Spans of 0, 60 and 120 tokens and 7.5 to fade out.
    reach = torch.tensor([7, 67, 127])
    layout = window_layout(SlidingWindow(150), 300, reach, query_block_size=32, key_block_size=16)
    assert layout.counts[0, 0].sum() < layout.counts[0, 1].sum() < layout.counts[0, 2].sum()
    compare(layout, 2, 3, 300, 32, span=120.0)
