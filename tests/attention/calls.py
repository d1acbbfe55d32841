"""Random calls of the operator and grids of options, shared by the tests of its backends."""

import itertools
import os
import random
import shutil
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from adaptive_longformer.attention import AttentionSpan, GlobalProjections, sparse_attention
from adaptive_longformer.attention.functional import make_call
from adaptive_longformer.attention.kernels.build import cpp_compiler
from adaptive_longformer.attention.kernels.load import why_unavailable
from adaptive_longformer.attention.reference import dense_mask
from adaptive_longformer.patterns import BlockLayout, EntryFlag, SlidingWindow, block_layout

# Relative errors of a correct kernel are well below these.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
# Of so many combinations a grid is made; of more, a sample.
_MOST_COMBINATIONS = 1000


def skip_without_cpp_compiler():
    """Skips a test of the C++ kernels where they cannot be had; with a compiler they have to be."""
    mode = os.environ.get("ADAPTIVE_LONGFORMER_KERNELS", "on")
    if mode != "on":
        pytest.skip(f"ADAPTIVE_LONGFORMER_KERNELS is {mode!r}")
    if shutil.which(cpp_compiler().partition(" ")[0]) is None:
        pytest.skip(f"no C++ compiler ({cpp_compiler()})")
    reason = why_unavailable("cpu")
    assert reason is None, reason


def pairwise(options):
    """A greedy list of combinations in which every pair of values of two options occurs."""
    names = list(options)
    missing = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x in range(len(options[a]))
        for y in range(len(options[b]))
    }
    everything = list(itertools.product(*(range(len(options[name])) for name in names)))
    if len(everything) > _MOST_COMBINATIONS:
        everything = random.Random(0).sample(everything, _MOST_COMBINATIONS)
    rows = []
    while missing:
        best = max(
            everything,
            key=lambda row: sum(
                pair in missing for pair in itertools.combinations(zip(names, row, strict=True), 2)
            ),
        )
        found = set(itertools.combinations(zip(names, best, strict=True), 2))
        assert missing & found, "the sample lacks a pair"
        missing -= found
        rows.append({name: options[name][index] for name, index in zip(names, best, strict=True)})
    return rows


def readable(value):
    """The id of a test's parameter."""
    if isinstance(value, dict):
        return "-".join(f"{name}={item}" for name, item in value.items())
    return getattr(value, "spec", str(value))


def routed_layout(length=300, query_block=64, key_block=64, batch=1, heads=1, window=None):
    """Random SELECTED entries besides a window, whose edge they overlap; with a bias."""
    window = window or SlidingWindow(40, 20)
    generator = torch.Generator().manual_seed(0)
    base = block_layout(window, length, query_block_size=query_block, key_block_size=key_block)
    shape = (batch, heads, base.num_query_blocks, base.num_key_blocks)
    routed = torch.rand(shape, generator=generator) < 0.3
    used = base.used.expand(*shape[:3], -1)
    ids = torch.arange(shape[3], dtype=torch.int32).expand(shape)
    layout = replace(
        base,
        key_blocks=torch.cat([base.key_blocks.expand_as(used), ids], dim=-1),
        flags=torch.cat(
            [base.flags.expand_as(used).where(used, 0), routed.int() * int(EntryFlag.SELECTED)],
            dim=-1,
        ),
        counts=torch.full(shape[:3], used.shape[-1] + shape[3], dtype=torch.int32),
    )
    layout = layout.select(layout.flags != 0)
    bias = torch.randn(layout.key_blocks.shape, generator=generator, dtype=torch.float64)
    return replace(layout, bias=bias)


def random_call(
    pattern,
    *,
    batch=2,
    heads=2,
    key_heads=None,
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

    key_heads: None for as many as heads.
    padding: None, "left" (row 0), "right" (last row) or "all" (row 0 is nothing but padding).
    global_tokens: None, "none" (a mask without any), "few" or "many".
    global_qkv: None, "explicit" or "absorbed".
    """
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape, scale=1.0):
        tensor = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        return tensor.to(dtype).requires_grad_()

    key_heads = key_heads or heads
    tensors = [leaf(batch, count, length, head_dim) for count in (heads, key_heads, key_heads)]
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


def to_device(call, device, dtype):
    """The same call on a device, with its leaves in another type."""
    tensors, options, leaves = call
    moved = {id(leaf): leaf.detach().to(device, dtype).requires_grad_() for leaf in leaves}
    options = dict(options)
    for name, value in options.items():
        if isinstance(value, torch.Tensor):
            options[name] = moved[id(value)] if id(value) in moved else value.to(device)
        elif isinstance(value, tuple):
            parts = [moved.get(id(part), part) for part in value]
            options[name] = type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return [moved[id(tensor)] for tensor in tensors], options, list(moved.values())


def layout_to(layout, device):
    """The same layout on a device, its bias in float32."""
    return replace(
        layout,
        key_blocks=layout.key_blocks.to(device),
        counts=layout.counts.to(device),
        flags=layout.flags.to(device),
        bias=None if layout.bias is None else layout.bias.to(device, torch.float32),
    )


def relative_errors(actual, expected):
    """Of each result, in the norm of all its elements; absolute where that is below 1."""
    return [
        float((a.double() - e.double()).norm() / max(float(e.double().norm()), 1.0))
        for a, e in zip(actual, expected, strict=True)
    ]


def assert_half_precision(pattern, backend, dtype, device, **options):
    """A backend in half precision is near float64 in value and in every gradient; and where dense
    attention with a mask can compute the same, at most twice as far from it as that.
    """
    call = random_call(pattern, **options)
    for leaf in call[2]:  # the same rounded numbers on both sides
        leaf.data = leaf.data.to(dtype).double()
    if isinstance(pattern, BlockLayout):
        pattern = layout_to(pattern, device)
    half, exact = (to_device(call, device, wanted) for wanted in (dtype, torch.float64))
    actual = value_and_gradients(pattern, *half, backend)
    expected = value_and_gradients(pattern, *exact, "reference")
    assert all(result.isfinite().all() for result in actual)
    errors = relative_errors(actual, expected)
    limits = [TOLERANCE[dtype]] * len(errors)
    if backend != "blocked":
        # Sums that cancel, as the gradient of a span may, lose digits in any such computation.
        other = relative_errors(value_and_gradients(pattern, *half, "blocked"), expected)
        limits = [max(limit, 2 * error) for limit, error in zip(limits, other, strict=True)]
    assert all(a <= limit for a, limit in zip(errors, limits, strict=True)), (errors, limits)
    has_bias = isinstance(pattern, BlockLayout) and pattern.bias is not None
    if has_bias or {"dropout_seed", "span", "entry_bias", "global_qkv"} & set(call[1]):
        return
    results = []
    for (tensors, arguments, _), run in ((half, backend), (half, None), (exact, "reference")):
        if run is None:
            output = masked_dense_attention(*tensors, pattern, **arguments)
        else:
            output = sparse_attention(*tensors, pattern, backend=run, **arguments)
        generator = torch.Generator().manual_seed(98)
        upstream = torch.randn(output.shape, generator=generator).to(device, dtype)
        grads = torch.autograd.grad(output, tensors, upstream.to(output.dtype))
        results.append([output.detach(), *grads])
    ours, dense = (relative_errors(result, results[2]) for result in results[:2])
    # Dense attention may be exact by chance, with one visible key: less than one rounding is free.
    floor = torch.finfo(dtype).eps / 4
    for name, a, b in zip(("output", "query", "key", "value"), ours, dense, strict=True):
        assert a <= 2 * b + floor, f"{name}: error {a:.2e}, that of dense attention is {b:.2e}"


def masked_dense_attention(query, key, value, pattern, **options):
    """torch's attention in the type of its tensors, with the visible pairs as a dense mask."""
    call = make_call(query, key, value, pattern, **options)
    mask = dense_mask(call)
    is_empty = ~mask.any(dim=-1, keepdim=True)
    output = scaled_dot_product_attention(
        call.query, call.key, call.value, attn_mask=mask | is_empty, scale=call.scale
    )
    return output.masked_fill(is_empty, 0.0)
