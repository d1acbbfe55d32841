import itertools
import os
from dataclasses import replace

import pytest
import torch
from calls import (
    assert_backend_matches,
    assert_half_precision,
    pairwise,
    random_call,
    readable,
    routed_layout,
    value_and_gradients,
)

from adaptive_longformer.attention import explain_backends, sparse_attention
from adaptive_longformer.patterns import (
    EntryFlag,
    Fixed,
    Full,
    GlobalTokens,
    RandomBlocks,
    SlidingWindow,
    Strided,
    block_layout,
)

PATTERNS = [
    Full(),
    SlidingWindow(0),
    SlidingWindow(5),
    SlidingWindow(3, 9),
    SlidingWindow(3, dilation=(1, 2)),
    Strided(16),
    Fixed(16, 3),
    RandomBlocks(2, 16),
    SlidingWindow(4) | RandomBlocks(2, 16),
    SlidingWindow(4) | Strided(12) | GlobalTokens((3,)),
]
LENGTHS = [1, 2, 63, 64, 65, 127, 131]
OPTIONS = {
    "padding": [None, "left", "right", "all"],
    "global_tokens": [None, "none", "few", "many"],
    "global_qkv": [None, "explicit", "absorbed"],
    "is_causal": [False, True],
    "dropout_p": [0.0, 0.3],
    "span": [False, True],
}
FULL_GRID = os.environ.get("ADAPTIVE_LONGFORMER_FULL_GRID") == "1"


def grid(options):
    if FULL_GRID:
        rows = itertools.product(*options.values())
        return [dict(zip(options, row, strict=True)) for row in rows]
    return list(pairwise(options))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=readable)
def test_blocked_matches_reference_for_every_pattern_and_length(pattern, length):
    assert_backend_matches(pattern, "blocked", tolerance=1e-9, length=length)


@pytest.mark.parametrize("options", grid(OPTIONS), ids=readable)
def test_blocked_matches_reference_for_every_option(options):
    for pattern in (SlidingWindow(7, 2), SlidingWindow(4) | Strided(12)):
        assert_backend_matches(pattern, "blocked", tolerance=1e-9, **options)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("padding", [None, "left", "all"])
@pytest.mark.parametrize("block_sizes", [(8, 8), (16, 16), (32, 16), (16, 64)], ids=str)
def test_blocked_matches_reference_on_a_layout_with_biases(block_sizes, padding, is_causal):
    layout = block_layout(
        SlidingWindow(20) | Strided(48),
        150,
        query_block_size=block_sizes[0],
        key_block_size=block_sizes[1],
    )
    assert ((layout.flags & EntryFlag.PATTERN) != 0).any()
    assert_backend_matches(
        layout,
        "blocked",
        tolerance=1e-9,
        length=150,
        padding=padding,
        is_causal=is_causal,
        entry_bias=True,
        span=True,
        global_tokens="few",
        dropout_p=0.2,
    )


def test_blocked_matches_reference_on_lists_that_differ_by_batch_and_head():
    layout = block_layout(RandomBlocks(2, 16), 100, query_block_size=16, key_block_size=16)
    generator = torch.Generator().manual_seed(3)
    shape = (2, 2, layout.num_query_blocks, 3)
    blocks = torch.rand(*shape[:3], 7, generator=generator).argsort(dim=-1)[..., :3].int()
    layout = type(layout)(
        key_blocks=blocks,
        counts=torch.randint(0, 4, shape[:3], generator=generator, dtype=torch.int32),
        flags=torch.full(shape, int(EntryFlag.SELECTED), dtype=torch.int32),
        bias=torch.randn(shape, generator=generator, dtype=torch.float64),
        query_block_size=16,
        key_block_size=16,
        length=100,
    )
    layout.validate()
    for global_tokens in (None, "few"):
        assert_backend_matches(
            layout, "blocked", tolerance=1e-9, length=100, global_tokens=global_tokens
        )


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)],
    ids=str,
)
def test_blocked_is_as_exact_as_its_type(dtype, tolerance):
    for options in (
        {},
        {"padding": "left", "global_tokens": "few", "global_qkv": "absorbed", "dropout_p": 0.1},
    ):
        assert_backend_matches(
            SlidingWindow(16) | Strided(40),
            "blocked",
            tolerance=tolerance,
            dtype=dtype,
            length=131,
            **options,
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": "all", "is_causal": True, "key_heads": 1},
        {"padding": "left", "global_tokens": "few", "head_dim": 32},
        {"padding": "right", "dropout_p": 0.1, "span": True, "entry_bias": True},
    ],
    ids=readable,
)
def test_blocked_is_as_exact_in_half_precision_as_dense_attention(options, dtype):
    layout = replace(routed_layout(300, 128), bias=None)
    assert_half_precision(layout, "blocked", dtype, "cpu", length=300, **options)


@pytest.mark.parametrize("padding", OPTIONS["padding"])
@pytest.mark.parametrize("global_tokens", OPTIONS["global_tokens"])
@pytest.mark.parametrize("global_qkv", OPTIONS["global_qkv"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_sdpa_matches_reference(padding, global_tokens, global_qkv, is_causal):
    for pattern in (SlidingWindow(5), SlidingWindow(100), Full(), Strided(12)):
        tensors, options, leaves = random_call(
            pattern,
            padding=padding,
            global_tokens=global_tokens,
            global_qkv=global_qkv,
            is_causal=is_causal,
        )
        results = []
        for backend in ("sdpa", "reference"):
            output = sparse_attention(*tensors, pattern, backend=backend, **options)
            upstream = torch.linspace(-1, 1, output.numel(), dtype=output.dtype)
            gradients = torch.autograd.grad(
                output, leaves, upstream.view(output.shape), materialize_grads=True
            )
            results.append([output, *gradients])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)


def test_gradcheck_of_blocked_on_a_tiny_size():
    layout = block_layout(SlidingWindow(2) | Strided(5), 11, query_block_size=8, key_block_size=8)
    tensors, options, leaves = random_call(
        layout,
        batch=1,
        heads=2,
        length=11,
        head_dim=3,
        entry_bias=True,
        span=True,
        global_tokens="few",
        global_qkv="absorbed",
        dropout_p=0.2,
    )

    def call(*_):
        return sparse_attention(*tensors, layout, return_lse=True, backend="blocked", **options)

    torch.autograd.gradcheck(call, leaves, atol=1e-6, fast_mode=True)


def test_absorbed_projections_equal_explicit_ones_on_either_side_of_the_switch():
    # 2 heads x 3 global tokens stay below the hidden size of 16 (absorbed), 2 x 35 go beyond it.
    for global_tokens in ("few", "many"):
        pattern = SlidingWindow(6)
        tensors, options, _ = random_call(
            pattern, global_tokens=global_tokens, global_qkv="absorbed"
        )
        absorbed = sparse_attention(*tensors, pattern, backend="blocked", **options)
        options["global_qkv"] = options["global_qkv"].project(2)
        explicit = sparse_attention(*tensors, pattern, backend="blocked", **options)
        torch.testing.assert_close(absorbed, explicit, atol=1e-10, rtol=1e-10)


def test_separate_projections_get_zero_gradients_when_no_token_is_global():
    pattern = SlidingWindow(6)
    tensors, options, leaves = random_call(pattern, global_tokens="none", global_qkv="absorbed")
    output = sparse_attention(*tensors, pattern, backend="blocked", **options)
    gradients = torch.autograd.grad(output.sum(), leaves)
    assert all(gradient.eq(0).all() for gradient in gradients[3:])
    assert all(gradient.ne(0).any() for gradient in gradients[2:3])


def test_a_row_that_sees_nothing_is_zero_with_zero_gradients():
    pattern = SlidingWindow(2)
    tensors, options, leaves = random_call(pattern, padding="all")
    for backend in ("reference", "blocked"):
        output, _, *gradients = value_and_gradients(pattern, tensors, options, leaves, backend)
        assert output[0].eq(0).all()
        assert all(gradient[0].eq(0).all() for gradient in gradients)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("global_qkv", [None, "explicit", "absorbed"])
@pytest.mark.parametrize("backend", ["reference", "blocked", "sdpa"])
def test_garbage_in_padding_does_not_leak(backend, global_qkv, garbage):
    pattern = SlidingWindow(9)
    results = []
    for is_dirty in (False, True):
        tensors, options, leaves = random_call(
            pattern, padding="left", global_tokens="few", global_qkv=global_qkv
        )
        mask = options["attention_mask"]
        for leaf in leaves[: 6 if global_qkv == "explicit" else 4] if is_dirty else ():
            rows = leaf.data if leaf.ndim == 3 else leaf.data.transpose(1, 2)
            rows[~mask] = garbage  # [batch, length, ...]
        output = sparse_attention(*tensors, pattern, backend=backend, **options)
        real = mask[:, None, :, None]
        loss = output.masked_fill(~real, 0.0).square().sum()
        gradients = torch.autograd.grad(loss, leaves)
        results.append([output.masked_fill(~real, 0.0), *gradients])
    for clean, dirty in zip(*results, strict=True):
        torch.testing.assert_close(dirty, clean)


def test_non_contiguous_and_expanded_inputs_are_read_right():
    pattern = SlidingWindow(9) | Strided(30)
    base = torch.randn(2, 70, 3, 2, 8, dtype=torch.float64)
    query, key, value = base.permute(2, 0, 3, 1, 4)
    value = value[:, :1].expand(-1, 2, -1, -1)
    expected = sparse_attention(
        query.contiguous(), key.contiguous(), value.contiguous(), pattern, backend="reference"
    )
    for backend in ("blocked", "sdpa"):
        output = sparse_attention(query, key, value, pattern, backend=backend)
        torch.testing.assert_close(output, expected)


def test_grouped_queries_share_their_key_heads():
    query = torch.randn(2, 4, 40, 8, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, 40, 8, dtype=torch.float64)
    grouped = sparse_attention(query, key, value, SlidingWindow(5), backend="blocked")
    repeated = sparse_attention(
        query,
        key.repeat_interleave(2, 1),
        value.repeat_interleave(2, 1),
        SlidingWindow(5),
        backend="reference",
    )
    torch.testing.assert_close(grouped, repeated)


@pytest.mark.parametrize("pattern", [SlidingWindow(3), Strided(4)], ids=readable)
@pytest.mark.parametrize("shape", [(0, 2, 12, 8), (2, 2, 0, 8)], ids=["batch", "length"])
@pytest.mark.parametrize("backend", ["blocked", "sdpa", "reference"])
def test_empty_tensors_give_empty_results(backend, shape, pattern):
    query = torch.randn(shape, requires_grad=True)
    mask = torch.zeros(shape[0], shape[2], dtype=torch.bool)
    output = sparse_attention(query, query, query, pattern, global_mask=mask, backend=backend)
    assert output.shape == shape
    (gradient,) = torch.autograd.grad(output.sum(), query)
    assert gradient.shape == shape


def test_long_inputs_agree_across_many_tiles_of_several_head_groups():
    assert_backend_matches(
        SlidingWindow(256),
        "blocked",
        tolerance=1e-9,
        batch=1,
        heads=5,
        length=1500,
        head_dim=4,
        global_tokens="few",
        dropout_p=0.1,
    )


def test_explain_backends_gives_a_reason_and_a_named_backend_never_falls_back():
    tensors, options, _ = random_call(SlidingWindow(5), dropout_p=0.1)
    reasons = explain_backends(*tensors, SlidingWindow(5), **options)
    assert reasons["blocked"] is None
    assert reasons["reference"] is None
    assert "dropout" in reasons["sdpa"]
    with pytest.raises(ValueError, match="'sdpa' cannot run this call: its dropout"):
        sparse_attention(*tensors, SlidingWindow(5), backend="sdpa", **options)
    with pytest.raises(ValueError, match="backend is 'fast'"):
        sparse_attention(*tensors, SlidingWindow(5), backend="fast", **options)


def test_auto_equals_the_reference_on_both_sides_of_the_crossover():
    for length in (100, 1000):
        tensors, options, _ = random_call(
            SlidingWindow(32), length=length, heads=1, global_tokens="few"
        )
        torch.testing.assert_close(
            sparse_attention(*tensors, SlidingWindow(32), **options),
            sparse_attention(*tensors, SlidingWindow(32), backend="reference", **options),
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 3)}, r"query has shape \(2, 3\)"),
        ({"key": torch.zeros(1, 2, 9, 4)}, "key has shape"),
        ({"value": torch.zeros(1, 2, 8, 4, dtype=torch.float64)}, "value is torch.float64"),
        ({"query": torch.zeros(1, 2, 8, 4).long()}, "key is torch.float32"),
        ({"attention_mask": torch.ones(1, 8)}, "attention_mask has shape .* dtype torch.float32"),
        ({"attention_mask": torch.ones(1, 9, dtype=torch.bool)}, "attention_mask has shape"),
        ({"global_mask": torch.ones(8, dtype=torch.bool)}, "global_mask has shape"),
        ({"max_global_tokens": -1}, "max_global_tokens is -1"),
        ({"dropout_p": 1.0}, "dropout_p is 1.0"),
        ({"dropout_p": 0.1}, "dropout_seed is None"),
        ({"dropout_p": 0.1, "dropout_seed": torch.zeros(1)}, "dropout_seed has shape"),
        ({"pattern": "window"}, "pattern_or_layout is a str"),
        ({"pattern": GlobalTokens((0,))}, "only global tokens"),
        ({"pattern": SlidingWindow(2, dilation=(1, 2, 3))}, "dilation has 3 numbers"),
        ({"entry_bias": torch.zeros(1)}, "entry_bias is given with a pattern"),
        ({"pattern": block_layout(SlidingWindow(2), 9)}, "layout is for length 9"),
    ],
)
def test_bad_arguments_are_named_with_what_is_allowed(change, message):
    arguments = {name: torch.zeros(1, 2, 8, 4) for name in ("query", "key", "value")}
    arguments["pattern"] = SlidingWindow(2)
    arguments.update(change)
    tensors = [arguments.pop(name) for name in ("query", "key", "value", "pattern")]
    with pytest.raises(ValueError, match=message):
        sparse_attention(*tensors, **arguments)
