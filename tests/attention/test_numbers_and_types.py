"""Numbers that are too large or not finite, and arguments of wrong types."""

import sys
from dataclasses import replace

import pytest
import torch
from calls import routed_layout, skip_without_cpp_compiler

from adaptive_longformer.attention import AttentionSpan, GlobalProjections, sparse_attention
from adaptive_longformer.attention.backends.compiled import compiled_attention
from adaptive_longformer.attention.call import make_call
from adaptive_longformer.attention.global_keys import GlobalKeys
from adaptive_longformer.attention.operator import GRADIENTS, expand
from adaptive_longformer.patterns import (
    BigBird,
    Fixed,
    Full,
    GlobalTokens,
    RandomBlocks,
    SlidingWindow,
    Strided,
    block_layout,
)

BACKENDS = ["sdpa", "cpp", "blocked", "reference"]
LARGEST = 2**31 - 1


def tensors(*shape, seed=0, count=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*(shape or (1, 2, 70, 8)), generator=generator) for _ in range(count)]


@pytest.mark.parametrize("number", [2**31, sys.maxsize, 2**63, -1, 1.0, "3", True, None, [1]])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda n: SlidingWindow(n), "left"),
        (lambda n: SlidingWindow(3, "3" if n is None else n), "right"),
        (lambda n: SlidingWindow(3, dilation=n), "dilation"),
        (lambda n: SlidingWindow(3, dilation=(1, n)), "dilation"),
        (lambda n: Strided(n), "stride"),
        (lambda n: Fixed(LARGEST, n), "summary_size"),
        (lambda n: RandomBlocks(n), "num_blocks"),
        (lambda n: RandomBlocks(2, n), "block_size"),
        (lambda n: RandomBlocks(2, 16, n), "seed"),
        (lambda n: BigBird(16, n), "num_random_blocks"),
        (lambda n: BigBird(n), "block_size"),
        (lambda n: GlobalTokens((1, n)), "positions"),
        (lambda n: block_layout(Full(), n), "length"),
        (lambda n: block_layout(Full(), 70, query_block_size=n), "query_block_size"),
        (lambda n: block_layout(Full(), 70, num_heads=n), "num_heads"),
    ],
)
def test_numbers_of_patterns_are_whole_and_fit_32_bits(make, name, number):
    with pytest.raises(ValueError, match=rf"{name} is .*(is needed|is allowed)"):
        make(number)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "pattern",
    [
        SlidingWindow(LARGEST),
        SlidingWindow(0, LARGEST),
        SlidingWindow(LARGEST, dilation=LARGEST) | SlidingWindow(1),
        SlidingWindow(LARGEST, dilation=(LARGEST, 2)),
        SlidingWindow(1) | Strided(LARGEST),
        SlidingWindow(1) | Fixed(LARGEST, LARGEST),
        SlidingWindow(1) | RandomBlocks(LARGEST, LARGEST, LARGEST),
        SlidingWindow(1) | GlobalTokens((3, LARGEST)),
        BigBird(16, LARGEST),
    ],
    ids=str,
)
def test_the_largest_numbers_are_right_on_every_backend(pattern, is_causal):
    query, key, value = tensors()
    expected = sparse_attention(
        query.double(), key.double(), value.double(), pattern, is_causal=is_causal,
        backend="reference",
    )  # fmt: skip
    for backend in ("auto", "sdpa", "blocked"):
        output = sparse_attention(query, key, value, pattern, is_causal=is_causal, backend=backend)
        torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)


LAYOUT = routed_layout(70, 16, 16)
PROJECTIONS = GlobalProjections(torch.zeros(1, 70, 12), *[torch.zeros(16, 12), torch.zeros(16)] * 3)
MASK = torch.zeros(1, 70, dtype=torch.bool)
META = torch.zeros(1, 2, 70, 8, device="meta")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({name: value}, f"{name} is a") for name in ("query", "key", "value")
          for value in (None, [1.0], "text", 3)),
        *(({"pattern_or_layout": value}, "pattern_or_layout is a")
          for value in (None, {"left": 3}, 5, SlidingWindow)),
        *(({"attention_mask": value}, "attention_mask is a") for value in ([[True]], 1, "text")),
        ({"attention_mask": torch.ones(1, 70)}, "attention_mask has .* a bool mask"),
        *(({"global_mask": value}, "global_mask is a") for value in ([0], {0}, GlobalKeys(3))),
        ({"global_mask": GlobalKeys(MASK, MASK.to("meta"))}, "global_mask.positions is on meta"),
        *(({"is_causal": value}, "is_causal is a") for value in (1, None, "yes")),
        *(({"return_lse": value}, "return_lse is a") for value in (1, None, "yes")),
        *(({"scale": value}, "scale is") for value in
          (1j, float("nan"), float("inf"), -float("inf"), "1", [1.0], True, torch.ones(()))),
        *(({"dropout_p": value}, "dropout_p is") for value in
          (1j, float("nan"), 1.0, -0.1, "0", None, True)),
        *(({"dropout_p": 0.1, "dropout_seed": value}, "dropout_seed") for value in
          (None, 3, torch.zeros(()), torch.zeros(1, dtype=torch.int64))),
        *(({"max_global_tokens": value}, "max_global_tokens is") for value in
          (-1, 1.5, "2", True, 2**31, 2**63)),
        *(({"backend": value}, "backend is") for value in ({}, None, "fast", [], 3)),
        *(({"entry_bias": value, "pattern_or_layout": LAYOUT}, "entry_bias") for value in
          ([0.0], 1.0, LAYOUT.bias.to(torch.complex64), LAYOUT.key_blocks, LAYOUT.bias[0])),
        *(({"span": value}, "span") for value in
          (3, (torch.ones(2), 2.0), AttentionSpan([1.0, 2.0], 2.0), AttentionSpan(
              torch.ones(2), None), AttentionSpan(torch.ones(2), float("nan")),
           AttentionSpan(torch.ones(2, dtype=torch.int64), 2.0))),
        *(({"global_mask": MASK, "global_qkv": value}, "global_qkv") for value in
          (3, "abc", (META,), (META,) * 3, [None] * 3, PROJECTIONS._replace(hidden_states=None),
           PROJECTIONS._replace(key_weight=None), PROJECTIONS._replace(value_bias=META),
           PROJECTIONS._replace(query_weight=torch.zeros(16, 12, device="meta")),
           PROJECTIONS._replace(key_bias=torch.zeros(16, device="meta")))),
        ({"key": META}, "key is torch.float32 on meta, query is torch.float32 on cpu"),
        ({"value": META}, "value is torch.float32 on meta"),
        ({"query": META}, "key is torch.float32 on cpu, query is torch.float32 on meta"),
        *(({"pattern_or_layout": replace(LAYOUT, **{name: value})}, f"BlockLayout: {name}")
          for name, value in (
              ("key_blocks", None), ("key_blocks", LAYOUT.key_blocks.float()), ("counts", [1]),
              ("counts", LAYOUT.counts.to("meta")), ("flags", None), ("flags", LAYOUT.flags > 0),
              ("bias", LAYOUT.flags), ("bias", 1.0), ("window", 3), ("pattern", "full"),
              ("window", SlidingWindow(3, dilation=2)), ("key_block_size", "16"),
              ("query_block_size", 2**63))),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)  # fmt: skip
def test_wrong_types_are_named(change, message):
    query, key, value = tensors()
    arguments = dict(query=query, key=key, value=value, pattern_or_layout=SlidingWindow(3))
    with pytest.raises(ValueError, match=message):
        sparse_attention(**{**arguments, **change})


@pytest.mark.parametrize(
    "strides", [(0, 0, 8, 1), (0, 3, 1, 1), (16, 3, 1, 1), (1, 1, 1, 1), (0, 8, 0, 1)], ids=str
)
def test_tensors_whose_elements_share_memory_are_read_right(strides):
    storage = torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shared = storage.as_strided((2, 2, 5, 16), strides)
    for pattern in (Full(), SlidingWindow(1)):
        expected = sparse_attention(*[shared.clone()] * 3, pattern, backend="reference")
        for backend in ("auto", "sdpa", "blocked"):
            output = sparse_attention(shared, shared, shared, pattern, backend=backend)
            torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["query", "key", "value", "hidden_states"])
def test_rows_that_read_what_is_not_finite_are_nan_and_no_others(name, value, is_causal):
    skip_without_cpp_compiler()
    given = dict(zip(("query", "key", "value"), tensors(2, 2, 150, 8), strict=True))
    mask = torch.ones(2, 150, dtype=torch.bool)
    mask[1, 60:80] = False  # in the second sequence the same token is padding
    options = {"attention_mask": mask, "is_causal": is_causal}
    expected = torch.zeros(2, 2, 150, dtype=torch.bool)
    if name == "hidden_states":
        states, *rest = tensors(2, 150, 16, count=1) + tensors(16, 16, count=3)
        states[:, 70] = value
        weights = [part for weight in rest for part in (weight, None)]
        options["global_qkv"] = GlobalProjections(states, *weights)
        options["global_mask"] = MASK.new_zeros(2, 150).index_fill(1, torch.tensor([9, 90]), True)
        expected[0, :, 90] = True
        expected[0, :, 9] = not is_causal
    else:
        given[name][:, 1, 70, 3] = value
        expected[0, 1, 70] = True
        if name == "query":  # padding whose window holds tokens
            given[name][1, 1, 61, 3] = value
            expected[1, 1, 61] = True
        else:
            expected[0, 1, 70 if is_causal else 65 : 76] = True
    finite = {key: tensor.nan_to_num(0.0, 0.0, 0.0) for key, tensor in given.items()}
    if name == "hidden_states":
        clean = options["global_qkv"]._replace(hidden_states=states.nan_to_num(0.0, 0.0, 0.0))
        clean_options = {**options, "global_qkv": clean}
    else:
        clean_options = options
    for backend in BACKENDS:
        output = sparse_attention(
            **given, pattern_or_layout=SlidingWindow(5), backend=backend, **options
        )
        assert torch.equal(output.isnan().all(dim=-1), expected), backend
        assert torch.equal(output.isnan().any(dim=-1), expected), backend
        other = sparse_attention(
            **finite, pattern_or_layout=SlidingWindow(5), backend=backend, **clean_options
        )
        torch.testing.assert_close(output[~expected], other[~expected])


@pytest.mark.parametrize("backend", ["cpp", "blocked", "reference"])
def test_a_span_of_nan_makes_the_rows_of_its_head_nan(backend):
    skip_without_cpp_compiler()
    span = AttentionSpan(torch.tensor([torch.nan, 3.0]), 2.0)
    output = sparse_attention(*tensors(), SlidingWindow(5), span=span, backend=backend)
    assert output[:, 0].isnan().all() and output[:, 1].isfinite().all()


@pytest.mark.parametrize("backend", ["cpp", "blocked", "reference"])
def test_a_bias_of_minus_infinity_takes_an_entry_away(backend):
    """And behind the end of a list anything may stand."""
    skip_without_cpp_compiler()
    layout = replace(LAYOUT, bias=LAYOUT.bias.float())
    assert layout.bias is not None and not layout.used.all()
    taken = torch.zeros_like(layout.used)
    taken[..., -2:] = True
    taken &= (layout.flags & 2) == 0
    bias = layout.bias.masked_fill(taken, -torch.inf)
    for garbage in (-torch.inf, torch.nan):
        changed = replace(layout, bias=bias.where(layout.used, garbage))
        output = sparse_attention(*tensors(), changed, backend=backend)
        expected = sparse_attention(*tensors(), layout.select(~taken), backend="reference")
        torch.testing.assert_close(output, expected)


def test_an_operator_that_is_called_directly_reads_nothing_behind_an_end():
    skip_without_cpp_compiler()
    mask = torch.zeros(1, 70, dtype=torch.bool)
    mask[0, 3] = True
    options = dict(
        attention_mask=~mask, global_mask=mask.roll(9), dropout_p=0.1, entry_bias=LAYOUT.bias,
        dropout_seed=torch.tensor(3), span=AttentionSpan(torch.ones(2), 2.0),
    )  # fmt: skip
    right = expand(make_call(*tensors(), LAYOUT, **options))
    output, lse = compiled_attention(*right)
    short = {
        name: value.narrow(-1, 0, value.shape[-1] - 1)
        for name, value in right._asdict().items()
        if isinstance(value, torch.Tensor) and value.ndim and name != "global_positions"
    }
    wrong = [
        *short.items(), ("key", right.key[:, :, :9]), ("value", right.value.double()),
        ("attention_mask", mask.long()), ("global_positions", right.global_positions.int()),
        ("key_blocks", right.key_blocks[:, :, :1]), ("key_blocks", right.key_blocks + 9),
        ("counts", right.counts + 99), ("key_block_size", 0), ("query_block_size", 4),
        ("dropout_seed", torch.zeros(3, dtype=torch.int64)),
    ]  # fmt: skip
    for name, value in wrong:
        with pytest.raises((ValueError, RuntimeError, IndexError)):
            compiled_attention(*right._replace(**{name: value}))
    # Positions are data: those that are none are not read.
    for position in (-1, -(2**40), 71, 2**40):
        changed = right._replace(global_positions=torch.full((1, 1), position))
        with pytest.raises((ValueError, RuntimeError, IndexError)):
            compiled_attention(*changed)
            raise ValueError("nothing was read")
    needed = [getattr(right, name) is not None for name in GRADIENTS]
    backward = torch.ops.adaptive_longformer.compiled_attention_backward
    gradients = (output, lse, output, lse)
    assert all(part.isfinite().all() for part in backward(*gradients, needed, *right))
    for index in range(4):
        cut = list(gradients)
        cut[index] = cut[index][:, :, :9]
        with pytest.raises((ValueError, RuntimeError)):
            backward(*cut, needed, *right)


@pytest.mark.parametrize(("batch", "heads", "length"), [(1, 1, 1500), (1, 3, 700), (2, 8, 300)])
def test_gradients_do_not_depend_on_the_number_of_threads(batch, heads, length):
    skip_without_cpp_compiler()
    leaves = [tensor.requires_grad_() for tensor in tensors(batch, heads, length, 8)]
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            output = sparse_attention(
                *leaves, SlidingWindow(100) | GlobalTokens((0, 5)), backend="cpp"
            )
            results.append(torch.autograd.grad(output.square().sum(), leaves))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))
