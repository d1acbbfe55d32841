import inspect
from dataclasses import replace
from functools import partial

import pytest
import torch
from calls import check_operator, random_call
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from adaptive_longformer.attention import sparse_attention
from adaptive_longformer.attention.backends import compiled, triton
from adaptive_longformer.attention.backends.blocked import blocked_attention
from adaptive_longformer.attention.call import make_call
from adaptive_longformer.attention.global_keys import GlobalKeys
from adaptive_longformer.attention.operator import collapse, expand, global_rows
from adaptive_longformer.patterns import SlidingWindow, Strided, block_layout
from adaptive_longformer.selection.options import SelectionOptions
from adaptive_longformer.selection.select_blocks import select_blocks

OPERATORS = torch.ops.adaptive_longformer


def tensors_of(*shapes):
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("global_qkv", [None, "explicit", "absorbed"])
def test_opcheck_of_blocked_attention(global_qkv):
    layout = block_layout(SlidingWindow(4) | Strided(16), 40, query_block_size=16, key_block_size=8)
    tensors, options, _ = random_call(
        layout, batch=1, length=40, padding="left", global_tokens="few", global_qkv=global_qkv,
        span=True, entry_bias=True, dropout_p=0.1,
    )  # fmt: skip
    check_operator(blocked_attention, make_call(*tensors, layout, **options))


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("global_qkv", [None, "explicit", "absorbed"])
def test_opcheck_of_global_rows(global_qkv, is_packed):
    pattern = SlidingWindow(2) | Strided(3)
    tensors, options, _ = random_call(
        pattern, length=12, global_tokens="few", global_qkv=global_qkv, dropout_p=0.1
    )
    if global_qkv is not None:
        tensors = [tensor.detach() for tensor in tensors]  # they are not read
    call = make_call(*tensors, pattern, **options)
    if not is_packed:
        call = replace(call, global_keys=GlobalKeys(call.global_keys.mask))
    output, lse = tensors_of((2, 2, 12, 8), (2, 2, 12))
    torch.library.opcheck(global_rows, (output, lse, *expand(call)))


def test_a_call_survives_being_taken_apart():
    """With every kind of argument, for a pattern and for a layout."""
    layout = block_layout(SlidingWindow(4) | Strided(16), 40, query_block_size=16, key_block_size=8)
    for pattern in (SlidingWindow(3, 1) | Strided(5), layout):
        options = {"span": True, "entry_bias": pattern is layout, "dropout_p": 0.1}
        tensors, options, _ = random_call(
            pattern, length=40, padding="right", global_tokens="few", global_qkv="absorbed",
            is_causal=True, **options,
        )  # fmt: skip
        call = make_call(*tensors, pattern, scale=0.7, **options)
        assert collapse(expand(call)) == call


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["blocked", "sdpa"])
def test_compiled_operator_is_one_graph_with_the_same_values_and_gradients(backend):
    pattern = SlidingWindow(5)
    tensors, options, leaves = random_call(
        pattern, global_tokens="few", global_qkv="absorbed", padding="left"
    )

    def call(query, key, value):
        return sparse_attention(query, key, value, pattern, backend=backend, **options)

    expected = call(*tensors)
    actual = torch.compile(call, fullgraph=True)(*tensors)
    torch.testing.assert_close(actual, expected)
    upstream = torch.randn_like(expected)
    for a, e in zip(
        torch.autograd.grad(actual, leaves, upstream),
        torch.autograd.grad(expected, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, e)


OUTSIDE = ("compiled_attention", "triton_attention", "blocked_attention", "global_rows")
INSIDE = ("compiled_attention_in_graphs", "triton_attention_in_graphs")


def test_torch_compile_keeps_what_caches_or_looks_up_out_of_its_cuda_graphs():
    """What mode "reduce-overhead" runs first is in the memory of a graph, where torch refuses
    lists that stay; and a graph cannot wait for the number of global tokens. That it accepts the
    other operators takes a GPU to see; that they wait for none, test_cuda_graphs.py says.
    """
    outside = [*OUTSIDE, *(f"{name}_backward" for name in OUTSIDE), "select_blocks"]
    inside = [*INSIDE, *(f"{name}_backward" for name in INSIDE)]
    inside += ["select_blocks_in_graphs", "selection_lists"]
    for names, is_outside in ((outside, True), (inside, False)):
        for name in names:
            tags = getattr(OPERATORS, name).default.tags
            assert (torch.Tag.cudagraph_unsafe in tags) == is_outside, name


@pytest.mark.parametrize("run", [compiled.run_compiled, triton.run_triton])
@pytest.mark.parametrize("global_tokens", [None, "not counted", "counted"])
@pytest.mark.parametrize("has_layout", [False, True], ids=["pattern", "layout"])
def test_only_calls_that_keep_and_look_up_nothing_are_in_cuda_graphs(
    run, global_tokens, has_layout, monkeypatch
):
    pattern, taken = SlidingWindow(4), []
    monkeypatch.setattr(
        inspect.getmodule(run), "run_operator", lambda operator, call: taken.append(operator._name)
    )
    query = torch.zeros(1, 1, 12, 8)
    call = make_call(query, query, query, block_layout(pattern, 12) if has_layout else pattern)
    if global_tokens is not None:
        mask = torch.arange(12)[None] == 0
        positions = torch.zeros(1, 1, dtype=torch.int64) if global_tokens == "counted" else None
        call = replace(call, global_keys=GlobalKeys(mask, positions))
    run(call)
    is_inside = has_layout and global_tokens != "not counted"
    assert taken[0].endswith("_in_graphs") == is_inside


@pytest.mark.parametrize("max_global_tokens", [None, 2])
@pytest.mark.parametrize("has_global_tokens", [False, True])
def test_a_choice_with_a_known_number_of_global_tokens_is_in_cuda_graphs(
    has_global_tokens, max_global_tokens
):
    query, key = torch.randn(2, 1, 1, 64, 8)
    mask = torch.arange(64)[None] == 0 if has_global_tokens else None
    options = SelectionOptions(1, 16, 16)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        select_blocks(
            query, key, SlidingWindow(8), options, global_mask=mask,
            max_global_tokens=max_global_tokens,
        )  # fmt: skip
    names = {row.key for row in profiler.key_averages()}
    is_inside = not has_global_tokens or max_global_tokens is not None
    assert ("adaptive_longformer::select_blocks_in_graphs" in names) == is_inside
    assert ("adaptive_longformer::select_blocks" in names) != is_inside


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("global_qkv", [None, "absorbed"])
def test_activation_checkpointing_changes_no_gradient(global_qkv, use_reentrant):
    pattern = SlidingWindow(5)
    tensors, options, leaves = random_call(
        pattern, padding="left", global_tokens="few", global_qkv=global_qkv
    )

    def call(query, key, value):
        # As a layer draws it: the recomputation has to draw the same.
        seed = torch.randint(2**62, ())
        return sparse_attention(
            query, key, value, pattern, backend="blocked",
            **{**options, "dropout_p": 0.5, "dropout_seed": seed},
        )  # fmt: skip

    results = []
    for run in (call, partial(checkpoint, call, use_reentrant=use_reentrant)):
        torch.manual_seed(0)
        output = run(*tensors)
        for leaf in leaves:
            leaf.grad = None
        output.square().sum().backward()
        results.append([output, *(leaf.grad for leaf in leaves)])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)
