"""Under autocast the operator gives what torch's scaled_dot_product_attention would: the types, and
the numbers of inputs that were cast by hand.
"""

import pytest
import torch
from calls import random_call, skip_without_cpp_compiler
from torch.nn.functional import scaled_dot_product_attention

from adaptive_longformer.attention import GlobalProjections, sparse_attention
from adaptive_longformer.patterns import Full, SlidingWindow

BACKENDS = ["reference", "blocked", "sdpa", "cpp"]
F16, BF16 = torch.float16, torch.bfloat16
F32, F64 = torch.float32, torch.float64


def skip_unless_it_runs(backend):
    if backend == "cpp":
        skip_without_cpp_compiler()


@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (F32, BF16, F32), (BF16, F32, F32)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_cast_as_for_dense_attention(backend, dtypes):
    skip_unless_it_runs(backend)
    tensors = [tensor.detach() for tensor in random_call(Full(), dtype=F32)[0]]
    leaves = [tensor.to(dtype).requires_grad_() for tensor, dtype in zip(tensors, dtypes)]
    upstream = torch.linspace(-1, 1, tensors[0].numel()).view_as(tensors[0])
    with torch.autocast("cpu", BF16):
        output = sparse_attention(*leaves, Full(), backend=backend)
        dense = scaled_dot_product_attention(*leaves)
    assert output.dtype == dense.dtype == BF16
    gradients = torch.autograd.grad(output, leaves, upstream.to(BF16))
    assert [gradient.dtype for gradient in gradients] == list(dtypes)
    low = [tensor.to(BF16).requires_grad_() for tensor in tensors]
    by_hand = sparse_attention(*low, Full(), backend=backend)
    assert torch.equal(output, by_hand)
    for gradient, expected in zip(
        gradients, torch.autograd.grad(by_hand, low, upstream.to(BF16)), strict=True
    ):
        assert torch.equal(gradient.to(BF16), expected)


def test_the_type_is_that_of_autocast():
    query = torch.randn(1, 2, 20, 8)
    with torch.autocast("cpu", F16):
        assert sparse_attention(query, query, query, Full(), backend="blocked").dtype == F16
        with torch.autocast("cpu", enabled=False):
            assert sparse_attention(query, query, query, Full(), backend="blocked").dtype == F32
    assert sparse_attention(query, query, query, Full(), backend="blocked").dtype == F32


def test_float64_is_left_alone_as_by_dense_attention():
    query = torch.randn(1, 2, 20, 8, dtype=F64)
    expected = sparse_attention(query, query, query, SlidingWindow(3), backend="blocked")
    with torch.autocast("cpu", BF16):
        assert scaled_dot_product_attention(query, query, query).dtype == F64
        output = sparse_attention(query, query, query, SlidingWindow(3), backend="blocked")
        assert torch.equal(output, expected)
        with pytest.raises(ValueError, match=r"key is torch.float64 .* query is torch.bfloat16"):
            sparse_attention(query.float(), query, query, SlidingWindow(3))


@pytest.mark.parametrize("global_qkv", ["explicit", "absorbed"])
def test_the_rows_of_global_tokens_are_computed_in_full_precision(global_qkv):
    """Also where the backward pass is called does not matter."""
    pattern = SlidingWindow(5)
    options = {"padding": "left", "global_tokens": "few", "global_qkv": global_qkv, "dtype": F32}
    results = []
    for is_outside in (False, True):
        tensors, arguments, leaves = random_call(pattern, **options)
        with torch.autocast("cpu", BF16):
            output = sparse_attention(*tensors, pattern, backend="blocked", **arguments)
            if not is_outside:
                gradients = torch.autograd.grad(output.float().square().sum(), leaves)
        if is_outside:
            gradients = torch.autograd.grad(output.float().square().sum(), leaves)
        results.append([output, *gradients])
    for inside, outside in zip(*results, strict=True):
        assert torch.equal(inside, outside)
    tensors, arguments, _ = random_call(pattern, **options)
    projections = arguments["global_qkv"]
    if not isinstance(projections, GlobalProjections):
        arguments["global_qkv"] = tuple(tensor.to(BF16) for tensor in projections)
    low = [tensor.to(BF16) for tensor in tensors]
    by_hand = sparse_attention(*low, pattern, backend="blocked", **arguments)
    assert torch.equal(results[0][0], by_hand)


def test_autocast_is_part_of_the_compiled_graph():
    query = torch.randn(1, 2, 70, 8)

    def attend(query):
        with torch.autocast("cpu", BF16):
            return sparse_attention(query, query, query, SlidingWindow(5), backend="blocked")

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(query), attend(query))
