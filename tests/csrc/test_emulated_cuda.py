"""The CUDA kernels, run thread by thread on the CPU, equal the definition in value and gradient.

They run through the same Python code as on a GPU, on tensors of the CPU.
"""

import shutil
from dataclasses import replace

import pytest
import torch
from calls import check_operator
from emulation import CUDA_SOURCES, build_emulator

from adaptive_longformer.attention import AttentionSpan, sparse_attention
from adaptive_longformer.attention.backends import compiled, cuda
from adaptive_longformer.attention.call import make_call
from adaptive_longformer.attention.kernels.cuda_launches import (
    ELEMENT_TYPES,
    HEAD_DIMS,
)
from adaptive_longformer.attention.reference import reference_attention
from adaptive_longformer.patterns import EntryFlag, SlidingWindow, block_layout
from adaptive_longformer.testing import use_library

WINDOW = SlidingWindow(40, 70)
SEED = torch.tensor(2**40 + 12345)
# Relative errors of a correct kernel are at most a quarter of these.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}


def random_layout(
    length, query_block=64, heads=1, seed=0, routed=None, batch=1, key_block=64, share=0.5,
    window=WINDOW,
):  # fmt: skip
    """A window and SELECTED entries, also on its edge; some lists are empty without the window.

    routed: which blocks of queries read which of keys, [batch, heads, query blocks, key blocks];
        a share of all pairs, drawn, if not given.
    """
    base = block_layout(window, length, query_block_size=query_block, key_block_size=key_block)
    shape = (batch, heads, base.num_query_blocks, base.num_key_blocks)
    if routed is None:
        routed = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
    used = base.used.expand(*shape[:3], -1)
    flags = [base.flags.expand_as(used).where(used, 0), routed.int() * int(EntryFlag.SELECTED)]
    ids = torch.arange(shape[3], dtype=torch.int32).expand(shape)
    layout = type(base)(
        key_blocks=torch.cat([base.key_blocks.expand_as(used), ids], dim=-1),
        flags=torch.cat(flags, dim=-1),
        counts=torch.full(shape[:3], used.shape[-1] + shape[3], dtype=torch.int32),
        query_block_size=query_block,
        key_block_size=key_block,
        length=length,
        window=window,
    )
    return layout.select(layout.flags != 0)


def errors(pattern, length, *, heads=1, head_dim=32, dtype=torch.bfloat16, batch=1, **options):
    """Relative errors of output, LSE and all gradients against float64; NaN where there is one."""
    generator = torch.Generator().manual_seed(length + head_dim)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    tensors = [
        draw(batch, length, heads, head_dim).transpose(1, 2).to(dtype).requires_grad_()
        for _ in range(3)
    ]
    if options.pop("with_bias", False):
        rows = pattern.key_blocks.shape
        bias = draw(rows[0], heads, *rows[2:]).requires_grad_()
        options["entry_bias"] = bias
        tensors.append(bias)
    if "span" in options:
        length_of_span = torch.linspace(10.0, options["span"], heads).requires_grad_()
        options["span"] = AttentionSpan(length_of_span, 9.5)
        tensors.append(length_of_span)
    grad_output = draw(batch, heads, length, head_dim).to(dtype)
    grad_lse = draw(batch, heads, length)

    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    exact_options = dict(options)
    if "entry_bias" in options:
        exact_options["entry_bias"] = exact[3]
    if "span" in options:
        exact_options["span"] = AttentionSpan(exact[-1], 9.5)
    output, lse = reference_attention(make_call(*exact[:3], pattern, **exact_options))
    # The rows of global queries are not the kernel's business.
    mask = options.get("global_mask", torch.zeros(batch, length, dtype=torch.bool))
    is_local = ~mask[:, None].expand_as(lse)
    is_empty = lse == -torch.inf
    grad_output = grad_output * is_local[..., None]
    grad_lse = grad_lse * is_local * ~is_empty
    finite_lse = lse.masked_fill(is_empty, 0.0)
    loss = (output * grad_output).sum() + (finite_lse * grad_lse).sum()
    expected = [output, finite_lse, *torch.autograd.grad(loss, exact, materialize_grads=True)]

    call = make_call(*tensors[:3], pattern, **options)
    with torch.no_grad():
        actual_output, actual_lse = cuda.forward(call)
        grads = cuda.backward(grad_output, grad_lse, actual_output, actual_lse, call)
    assert torch.equal((actual_lse == -torch.inf) & is_local, is_empty & is_local)
    assert (actual_output[is_empty & is_local] == 0).all()
    actual = [actual_output, actual_lse.masked_fill(is_empty, 0.0)]
    actual += [grad for grad in grads if grad is not None]
    assert len(actual) == len(expected)
    results = []
    for index, (a, b) in enumerate(zip(actual, expected)):
        difference = a.double() - b
        if index < 2:
            difference = difference[is_local]
        results.append((difference.norm() / max(b.norm().item(), 1.0)).item())
    return results


def assert_small(results, dtype=torch.bfloat16):
    assert all(error <= TOLERANCE[dtype] for error in results), results


def masks(length, batch=1):
    position = torch.arange(length).expand(batch, -1)
    attention_mask = (position >= length // 10) & (position < length - length // 8)
    return {"attention_mask": attention_mask, "global_mask": (position % 29 == 0) & attention_mask}


@pytest.mark.parametrize("query_block", [64, 128])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", ELEMENT_TYPES, ids=str)
def test_every_instance_matches_reference(emulator, dtype, head_dim, query_block):
    results = errors(
        random_layout(150, query_block),
        150,
        head_dim=head_dim,
        dtype=dtype,
        with_bias=True,
        dropout_p=0.2,
        dropout_seed=SEED,
        **masks(150),
    )
    assert_small(results, dtype)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("is_causal", [False, True], ids=["both_ways", "causal"])
def test_lengths_match_reference(emulator, length, is_causal):
    layout = random_layout(length, heads=2)
    assert_small(
        errors(layout, length, heads=2, is_causal=is_causal, with_bias=True, **masks(length))
    )


def test_shared_lists_of_many_heads_match_reference(emulator):
    layout = random_layout(140)
    assert_small(errors(layout, 140, heads=2, batch=2, span=60.0, with_bias=True, **masks(140, 2)))


def test_what_differs_between_batch_rows_and_heads_matches_reference(emulator, monkeypatch):
    """Lists, bias, dropout, padding and global tokens, which fill two blocks in one row."""
    original = cuda.gradient_items
    monkeypatch.setattr(cuda, "gradient_items", lambda layout: original(layout, 2))
    length = 140
    position, row = torch.arange(length), torch.arange(2)[:, None]
    attention_mask = (position >= 7 * row) & (position < length - 30 * (1 - row))
    is_global = torch.where(row == 0, position % 31 == 3, position % 2 == 0)
    layout = random_layout(length, heads=2, batch=2)
    assert not torch.equal(layout.key_blocks[0], layout.key_blocks[1])
    assert (is_global & attention_mask).sum(dim=1)[1] > 64
    assert_small(
        errors(
            layout, length, heads=2, batch=2, with_bias=True, span=60.0, is_causal=True,
            dropout_p=0.2, dropout_seed=SEED, attention_mask=attention_mask,
            global_mask=is_global & attention_mask,
        )
    )  # fmt: skip


@pytest.mark.parametrize("span", [12.0, 90.0])
def test_adaptive_span_matches_reference(emulator, span):
    assert_small(errors(SlidingWindow(60, 30), 140, heads=2, span=span, is_causal=True))


def test_everything_padded_gives_zeros(emulator):
    mask = torch.zeros(1, 70, dtype=torch.bool)
    assert_small(errors(random_layout(70), 70, with_bias=True, attention_mask=mask))


def test_split_columns_match_reference(emulator, monkeypatch):
    """A column of more entries than an item takes is added up in parts."""
    original = cuda.gradient_items
    monkeypatch.setattr(cuda, "gradient_items", lambda layout: original(layout, 2))
    layout = random_layout(330)
    items = original(layout, 2)
    assert (items.column_slots > 2).any()
    assert_small(errors(layout, 330, with_bias=True, **masks(330)))


def test_lists_longer_than_shared_memory_holds_match_float64(emulator, monkeypatch):
    """A list and a column of 68 steps among 90 candidates: some steps lie where others lay."""
    original = cuda.gradient_items
    monkeypatch.setattr(cuda, "gradient_items", lambda layout: original(layout, 1000))
    length = 90 * 64 - 7
    routed = torch.zeros(1, 1, 90, 90, dtype=torch.bool)
    routed[..., 1, :] = routed[..., 1] = True
    position = torch.arange(length)[None]
    # Every fourth block is nothing but padding: its entries are candidates, and no steps.
    mask = position // 64 % 4 != 3
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(1, 1, length, 32, generator=generator).bfloat16().requires_grad_()
        for _ in range(3)
    ]
    layout = random_layout(length, routed=routed)
    layout = replace(layout.select(layout.flags == EntryFlag.SELECTED), window=None)
    call = make_call(*tensors, layout, attention_mask=mask)
    upstream = torch.randn(1, 1, length, 32, generator=generator).bfloat16()
    with torch.no_grad():
        output, lse = cuda.forward(call)
        grads = cuda.backward(upstream, lse * 0, output, lse, call)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected = sparse_attention(*exact, layout, attention_mask=mask, backend="blocked")
    expected_grads = torch.autograd.grad(expected, exact, upstream.double())
    for actual, reference in zip([output, *grads[:3]], [expected, *expected_grads], strict=True):
        assert (actual.double() - reference).norm() <= 1e-2 * reference.norm()


def test_nan_in_padding_does_not_leak(emulator):
    torch.manual_seed(0)
    mask = torch.ones(2, 150, dtype=torch.bool)
    mask[0, 60:80] = mask[1, 110:] = False
    tensors = [torch.randn(2, 1, 150, 32, dtype=torch.bfloat16) for _ in range(3)]
    results = []
    for fill in (0.0, torch.nan):
        inputs = [tensor.masked_fill(~mask[:, None, :, None], fill) for tensor in tensors]
        call = make_call(*inputs, SlidingWindow(30), attention_mask=mask)
        output, lse = cuda.forward(call)
        grad = torch.ones_like(output).masked_fill(~mask[:, None, :, None], 0.0)
        grads = cuda.backward(grad, torch.zeros_like(lse), output, lse, call)
        results.append([output, *grads[:3]])
    for clean, dirty in zip(*results):
        assert torch.equal(clean.transpose(1, 2)[mask], dirty.transpose(1, 2)[mask])


def test_any_order_of_warps_gives_the_same_bits(emulator):
    torch.manual_seed(0)
    tensors = [torch.randn(1, 1, 130, 32, dtype=torch.bfloat16) for _ in range(3)]
    call = make_call(*tensors, SlidingWindow(50))
    results = []
    for seed in (1, 2, 3):
        emulator.adaptive_emulator_seed(seed)
        output, lse = cuda.forward(call)
        results.append([output, *cuda.backward(output, lse, output, lse, call)[:3]])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


# What a kernel may get wrong without a visible trace on most runs: (file, text, replacement).
MUTANTS = {
    "forward_without_wait": ("forward.cuh", "wait_for_copies<1>();", ""),
    "forward_waits_for_too_little": (
        "forward.cuh",
        "wait_for_copies<1>()",
        "wait_for_copies<2>()",
    ),
    "forward_without_barrier_before_use": (
        "forward.cuh",
        "wait_for_copies<1>();\n    synchronize_block();",
        "wait_for_copies<1>();",
    ),
    "forward_without_barrier_after_use": (
        "forward.cuh",
        "stage * KEY_BLOCK * D, lane);\n    synchronize_block();",
        "stage * KEY_BLOCK * D, lane);",
    ),
    "keys_without_barrier_after_use": (
        "backward.cuh",
        "warp * 16, rows, query_tile, grad_tile, lane);\n    }\n    synchronize_block();",
        "warp * 16, rows, query_tile, grad_tile, lane);\n    }",
    ),
    "keys_without_wait": (
        "backward.cuh",
        "wait_for_copies<1>();\n    synchronize_block();\n    steps.look_ahead(index, end",
        "synchronize_block();\n    steps.look_ahead(index, end",
    ),
    "wrong_lane_map": ("tile.cuh", "lane / 4 + j / 2 * 8", "lane % 8 + j / 2 * 8"),
    "wrong_matrix_rows": ("tile.cuh", "k * 16 + lane % 16, n", "k * 16 + lane % 8, n"),
    "wrong_swizzle": ("tile.cuh", "chunk ^ ((row >> 1) & 3)", "chunk | ((row >> 1) & 3)"),
    "no_scale_of_the_sum": ("forward.cuh", "sum[i][2 * h] *= decay;", ""),
}


def build_mutant(folder, mutant, instance):
    """The emulator with only one instance, in bfloat16 at head_dim 32, which compiles in a moment.

    mutant: file, text and replacement, or None.
    """
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build the emulator with")
    sources = folder / "cuda"
    shutil.copytree(CUDA_SOURCES, sources)
    launch = (sources / "launch.cuh").read_text()
    others = {"case 64:", "case 96:", "case 128:", "Constant<FLOAT16>", "return launch_instance"}
    for line in launch.splitlines():
        if any(text in line for text in others) and instance not in line:
            launch = launch.replace(line + "\n", "")
    assert launch.count("return launch_instance") == 1
    (sources / "launch.cuh").write_text(launch)
    if mutant is not None:
        name, text, replacement = mutant
        source = (sources / name).read_text()
        assert source.count(text) == 1
        (sources / name).write_text(source.replace(text, replacement))
    return build_emulator(folder, sources)


@pytest.mark.parametrize("mutant", ["none", *MUTANTS])
def test_emulator_catches(mutant, tmp_path):
    """A wrong kernel gives wrong numbers or an error; the right one passes the same test."""
    library = build_mutant(tmp_path, MUTANTS.get(mutant), "<TYPE, D, 64, KEY_BLOCK>")
    try:
        with use_library("cuda", library):
            results = errors(SlidingWindow(90), 200)
    except RuntimeError as error:
        assert mutant != "none" and "shared memory" in str(error)
        return
    is_correct = all(error <= TOLERANCE[torch.bfloat16] for error in results)
    assert is_correct == (mutant == "none"), results


def test_lists_of_a_pattern_are_made_once(emulator, monkeypatch):
    """They give the bits that the same lists give as a layout, which are made for every call."""
    pattern, length = SlidingWindow(50), 130
    made, original = [], cuda.gradient_items

    def counted(layout):
        made.append(layout)
        return original(layout, 2)  # the middle column is split

    monkeypatch.setattr(cuda, "gradient_items", counted)
    cuda._pattern_lists.cache_clear()
    torch.manual_seed(0)
    tensors = [torch.randn(1, 1, length, 32, dtype=torch.bfloat16) for _ in range(3)]
    global_mask = torch.arange(length)[None] == 3
    results = []
    for lists in (pattern, pattern, block_layout(pattern, length)):
        call = make_call(*tensors, lists, global_mask=global_mask)
        output, lse = cuda.forward(call)
        results.append([output, *cuda.backward(output, lse, output, lse, call)[:3]])
    cuda._pattern_lists.cache_clear()
    assert len(made) == 2
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_heads_are_worked_on_one_after_the_other_and_long_lists_first():
    layout = random_layout(500, heads=3, batch=2)
    lists = cuda._packed_lists(layout, 1)
    order, size = lists.order.view(6, -1).long(), layout.num_query_blocks
    assert torch.equal(order // size, torch.arange(6)[:, None].expand_as(order))
    counts = lists.layout.counts.flatten()[order]
    assert torch.equal(order.flatten().sort().values, torch.arange(6 * size))
    assert (counts.diff(dim=-1) <= 0).all() and (counts.diff(dim=-1) < 0).any()

    items = cuda.gradient_items(layout, 2)
    used = items.column >= 0
    assert used.any() and not used[used.int().sum() :].any()  # what is not used comes last
    rows = items.column[used] // layout.num_key_blocks
    lengths = (items.last - items.first)[used]
    assert (rows.diff() >= 0).all() and torch.equal(rows.unique(), torch.arange(6))
    assert (lengths.diff()[rows.diff() == 0] <= 0).all()


def test_a_pattern_without_split_columns_takes_no_room_for_their_sums(emulator):
    tensors = [torch.randn(1, 1, 70, 32, dtype=torch.bfloat16) for _ in range(3)]
    call = make_call(*tensors, SlidingWindow(9))
    lists = cuda._lists_of(call, 0)
    assert lists.items().num_slots == 0 and cuda._lists_of(call, 0) is lists


@pytest.mark.parametrize("is_permuted", [False, True], ids=["contiguous", "permuted"])
def test_operators_pass_opcheck(emulator, monkeypatch, is_permuted):
    """Also the backward pass by itself, whose strides torch.compile relies on."""
    monkeypatch.setattr(compiled, "_kernels", lambda call: cuda)
    torch.manual_seed(0)
    length, layout = 40, random_layout(40, heads=2)
    tensors = [torch.randn(1, 2, length, 32).bfloat16().requires_grad_() for _ in range(3)]
    bias = torch.randn(1, 2, *layout.key_blocks.shape[2:])
    if is_permuted:
        bias = bias.mT.contiguous().mT
    span = AttentionSpan(torch.tensor([20.0, 30.0]).requires_grad_(), 9.5)
    call = make_call(
        *tensors, layout, entry_bias=bias.requires_grad_(), span=span, dropout_p=0.1,
        dropout_seed=SEED, **masks(length),
    )  # fmt: skip
    check_operator(compiled.compiled_attention, call)
