"""Random calls of the operator, shared by the tests of its backends."""

import torch

from adaptive_longformer.attention import AttentionSpan, GlobalProjections, sparse_attention
from adaptive_longformer.patterns import BlockLayout


def random_call(
    pattern,
    *,
    batch=2,
    heads=2,
    length=70,
    head_dim=8,
    dtype=torch.float64,
    padding=None,
    global_tokens=None,
    global_qkv=None,
    span=False,
    entry_bias=False,
    dropout_p=0.0,
    is_causal=False,
    seed=0,
):
    """Tensors, options and leaves (what gets gradients) of a call.

    padding: None, "left" (row 0), "right" (last row) or "all" (row 0 is nothing but padding).
    global_tokens: None, "none" (a mask without any), "few" or "many".
    global_qkv: None, "explicit" or "absorbed".
    """
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape, scale=1.0):
        tensor = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        return tensor.to(dtype).requires_grad_()

    tensors = [leaf(batch, heads, length, head_dim) for _ in range(3)]
    leaves = list(tensors)
    options = {"is_causal": is_causal, "dropout_p": dropout_p}
    if dropout_p > 0:
        options["dropout_seed"] = torch.tensor(1234567890123 + seed)
    if padding is not None:
        mask = torch.ones(batch, length, dtype=torch.bool)
        if padding == "left":
            mask[0, : length // 3] = False
        elif padding == "right":
            mask[-1, length - length // 3 - 1 :] = False
        else:
            mask[0] = False
        options["attention_mask"] = mask
    if global_tokens is not None:
        mask = torch.zeros(batch, length, dtype=torch.bool)
        if global_tokens != "none":
            mask[0, 0] = True
            mask[-1, length // 2 : length // 2 + 3] = True
        if global_tokens == "many":
            mask[:, ::2] = True
        options["global_mask"] = mask
    if global_qkv == "explicit":
        options["global_qkv"] = tuple(leaf(batch, heads, length, head_dim) for _ in range(3))
        leaves += options["global_qkv"]
    elif global_qkv == "absorbed":
        size = heads * head_dim
        shapes = [(size, size), (size,)] * 3
        parameters = [leaf(*shape, scale=size**-0.5) for shape in shapes]
        options["global_qkv"] = GlobalProjections(leaf(batch, length, size), *parameters)
        leaves += options["global_qkv"]
    if span:
        options["span"] = AttentionSpan((leaf(heads).detach().abs() * 4).requires_grad_(), 5.0)
        leaves.append(options["span"].length)
    if entry_bias:
        assert isinstance(pattern, BlockLayout)
        options["entry_bias"] = leaf(1, heads, *pattern.key_blocks.shape[2:])
        leaves.append(options["entry_bias"])
    return tensors, options, leaves


def value_and_gradients(pattern, tensors, options, leaves, backend):
    """Output, LSE (-inf as -1) and every leaf's gradient under random upstream gradients."""
    output, lse = sparse_attention(*tensors, pattern, return_lse=True, backend=backend, **options)
    generator = torch.Generator().manual_seed(99)
    upstream = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    upstream_lse = torch.randn(lse.shape, generator=generator, dtype=torch.float64)
    upstream, upstream_lse = upstream.to(output.device), upstream_lse.to(output.device)
    finite = lse.isfinite()
    assert not lse.isnan().any()
    lse = lse.masked_fill(~finite, -1.0)
    loss = (output.double() * upstream).sum() + (lse.double() * upstream_lse * finite).sum()
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    gradients = [
        torch.zeros_like(leaf) if gradient is None else gradient
        for leaf, gradient in zip(leaves, gradients, strict=True)
    ]
    return [output.detach(), lse.detach(), *gradients]


def assert_backend_matches(pattern, backend, *, tolerance, exact_dtype=torch.float64, **options):
    """The backend equals the reference run in float64, in value and in every gradient."""
    actual_call = random_call(pattern, **options)
    exact_call = random_call(pattern, **{**options, "dtype": exact_dtype})
    if actual_call[0][0].dtype != exact_dtype:
        # The same rounded numbers, in the exact type.
        for actual, exact in zip(actual_call[2], exact_call[2], strict=True):
            exact.data.copy_(actual.data)
    actual = value_and_gradients(pattern, *actual_call, backend)
    expected = value_and_gradients(pattern, *exact_call, "reference")
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape
        assert a.isfinite().all(), f"result {index} is not finite"
        if e.numel():
            bound = tolerance * max(1.0, float(e.abs().max()))
            error = float((a.double() - e.double()).abs().max())
            assert error <= bound, f"result {index}: error {error:.2e} above {bound:.2e}"
