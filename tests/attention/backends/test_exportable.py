import pytest
import torch
from calls import pairwise, random_call, readable, relative_errors

from adaptive_longformer.attention import explain_backends, sparse_attention
from adaptive_longformer.patterns import Full, GlobalTokens, SlidingWindow, Strided, block_layout

OPTIONS = {
    "length": [1, 2, 15, 16, 17, 131],
    "padding": [None, "left", "right", "all"],
    "global_tokens": [None, "none", "few", "many"],
    "global_qkv": [None, "explicit", "absorbed"],
}
WINDOWS = [
    SlidingWindow(0), SlidingWindow(7, 2), SlidingWindow(1, 20), SlidingWindow(200),
    SlidingWindow(4) | GlobalTokens((0, 3)),
]  # fmt: skip


def results(pattern, call, backend):
    """Output and every leaf's gradient."""
    tensors, options, leaves = call
    output = sparse_attention(*tensors, pattern, backend=backend, **options)
    generator = torch.Generator().manual_seed(99)
    upstream = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    gradients = torch.autograd.grad((output.double() * upstream).sum(), leaves, allow_unused=True)
    zeros = [torch.zeros_like(leaf) for leaf in leaves]
    return [output.detach()] + [
        zero if gradient is None else gradient
        for gradient, zero in zip(gradients, zeros, strict=True)
    ]


@pytest.mark.parametrize("options", pairwise(OPTIONS), ids=readable)
def test_exportable_matches_reference_for_every_option(options):
    for pattern in WINDOWS:
        call = random_call(pattern, **options)
        actual, expected = (results(pattern, call, name) for name in ("exportable", "reference"))
        assert max(relative_errors(actual, expected)) < 1e-10


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)],
    ids=str,
)  # fmt: skip
def test_exportable_is_as_exact_as_its_type(dtype, tolerance):
    options = {"padding": "left", "global_tokens": "few", "global_qkv": "absorbed", "length": 131}
    pattern = SlidingWindow(16)
    call, exact = (random_call(pattern, dtype=kind, **options) for kind in (dtype, torch.float64))
    for given, same in zip(call[2], exact[2], strict=True):
        same.data.copy_(given.data)
    actual, expected = results(pattern, call, "exportable"), results(pattern, exact, "reference")
    assert max(relative_errors(actual, expected)) < tolerance


def test_exportable_says_what_it_cannot_compute():
    tensor = torch.zeros(1, 2, 20, 8)
    layout = block_layout(SlidingWindow(3), 20)
    for pattern in (Full(), SlidingWindow(3, dilation=2), SlidingWindow(3) | Strided(4), layout):
        assert explain_backends(tensor, tensor, tensor, pattern)["exportable"], pattern
    assert explain_backends(tensor, tensor, tensor, SlidingWindow(3), is_causal=True)["exportable"]
    assert explain_backends(tensor, tensor, tensor, SlidingWindow(3))["exportable"] is None
