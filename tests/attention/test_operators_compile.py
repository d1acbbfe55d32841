from functools import partial

import pytest
import torch
from calls import random_call
from torch.utils.checkpoint import checkpoint

from adaptive_longformer.attention import sparse_attention
from adaptive_longformer.attention.backends.blocked import blocked_attention
from adaptive_longformer.attention.global_rows import absorbed_global_rows, global_rows
from adaptive_longformer.patterns import SlidingWindow, Strided, block_layout

OPERATORS = torch.ops.adaptive_longformer


def tensors_of(*shapes):
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def test_opcheck_of_blocked_attention():
    query, key, value = tensors_of(*[(1, 2, 40, 8)] * 3)
    layout = block_layout(SlidingWindow(4) | Strided(16), 40, query_block_size=16, key_block_size=8)
    bias = torch.randn(1, 2, *layout.key_blocks.shape[2:], dtype=torch.float64, requires_grad=True)
    span = torch.rand(2, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(1, 40) > 0.2
    arguments = (
        query, key, value, "", layout.key_blocks, layout.counts, layout.flags, 16, 8,
        layout.window.spec, layout.pattern.spec, bias, span, 5.0, mask, mask, 40, False, 0.3, 0.1,
        torch.tensor(5),
    )  # fmt: skip
    torch.library.opcheck(blocked_attention, arguments)


def test_opcheck_of_global_rows():
    output, query, key, value = tensors_of(*[(2, 2, 12, 4)] * 4)
    (lse,) = tensors_of((2, 2, 12))
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[1, :2] = True
    states, *parameters = tensors_of((2, 12, 8), *[(8, 8), (8,)] * 3)
    for max_global_tokens in (None, 3):
        tail = (None, mask, max_global_tokens, False, 0.5, 0.1, torch.tensor(5))
        torch.library.opcheck(global_rows, (output, lse, query, key, value, *tail))
        torch.library.opcheck(absorbed_global_rows, (output, lse, states, *parameters, *tail))


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


@pytest.mark.parametrize(
    "name", ["compiled_attention", "blocked_attention", "global_rows", "absorbed_global_rows"]
)
def test_torch_compile_keeps_what_caches_or_looks_up_out_of_its_cuda_graphs(name):
    """What mode "reduce-overhead" runs first is in the memory of a graph, where torch refuses
    lists that stay; and a graph cannot wait for the number of global tokens.
    """
    for operator in (name, f"{name}_backward"):
        assert torch.Tag.cudagraph_unsafe in getattr(OPERATORS, operator).default.tags
    assert torch.Tag.cudagraph_unsafe in OPERATORS.select_blocks.default.tags


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
