"""A fixed number of global rows: nothing is looked up, and nothing but that changes."""

from dataclasses import replace

import pytest
import torch
from calls import random_call, value_and_gradients

from adaptive_longformer.attention import sparse_attention
from adaptive_longformer.attention.backends.blocked import run_blocked
from adaptive_longformer.attention.call import make_call
from adaptive_longformer.attention.global_keys import GlobalKeys, pack_global_tokens
from adaptive_longformer.patterns import GlobalTokens, SlidingWindow

PATTERN = SlidingWindow(5)


def results_with(max_global_tokens, call):
    """Output and gradients of the blocked backend, as on a device where nothing is looked up."""
    tensors, options, leaves = call
    call = make_call(*tensors, PATTERN, **options)
    if max_global_tokens is not None:
        mask = call.global_keys.mask
        keys = GlobalKeys(mask, pack_global_tokens(mask, max_global_tokens))
        call = replace(call, global_keys=keys)
    output, lse = run_blocked(call)
    is_valid = options["attention_mask"][:, None, :, None]
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    loss = output.masked_fill(~is_valid, 0.0).mul(weight).sum() + lse[:, :, 10].sum()
    grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
    return [output.masked_fill(~is_valid, 0.0), *grads]


@pytest.mark.parametrize("max_global_tokens", [3, 5, 100])
@pytest.mark.parametrize("global_qkv", [None, "explicit", "absorbed"])
def test_rows_without_a_token_change_nothing(global_qkv, max_global_tokens):
    """One sequence has one global token, the other three; 100 is more than there are tokens."""
    call = random_call(
        PATTERN, padding="right", global_tokens="few", global_qkv=global_qkv, dropout_p=0.1
    )
    for actual, expected in zip(results_with(max_global_tokens, call), results_with(None, call)):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("global_qkv", [None, "explicit", "absorbed"])
def test_a_mask_without_global_tokens_changes_nothing(global_qkv):
    call = random_call(PATTERN, padding="left", global_tokens="none", global_qkv=global_qkv)
    for actual, expected in zip(results_with(4, call), results_with(None, call)):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("global_qkv", [None, "explicit"])
def test_garbage_at_the_end_does_not_leak_through_rows_without_a_token(global_qkv):
    call = random_call(PATTERN, padding="right", global_tokens="few", global_qkv=global_qkv)
    clean = results_with(6, call)
    for leaf in call[2]:
        leaf.data[-1, :, -1] = torch.nan
    is_valid = call[1]["attention_mask"][:, None, :, None]
    for dirty, expected in zip(results_with(6, call), clean):
        # What a gradient is at the padding itself says nothing.
        assert torch.equal(dirty.masked_fill(~is_valid, 0.0), expected.masked_fill(~is_valid, 0.0))


@pytest.mark.parametrize("backend", ["reference", "blocked", "sdpa"])
def test_the_first_tokens_stay_global(backend):
    tensors, options, leaves = random_call(
        PATTERN, padding="left", global_tokens="many", global_qkv="explicit"
    )
    visible = options["global_mask"] & options["attention_mask"]
    first = visible & (visible.cumsum(dim=1) <= 4)
    assert first.sum(dim=1).tolist() == [4, 4]
    results = []
    for limits in ({"max_global_tokens": 4}, {"global_mask": first}):
        output = sparse_attention(*tensors, PATTERN, backend=backend, **{**options, **limits})
        results.append([output, *torch.autograd.grad(output.sum(), leaves)])
    for limited, chosen in zip(*results):
        assert torch.equal(limited, chosen)


def test_none_is_global_at_a_limit_of_zero():
    tensors, options, leaves = random_call(PATTERN)
    plain = value_and_gradients(PATTERN, tensors, options, leaves, "blocked")
    limited = value_and_gradients(
        PATTERN | GlobalTokens((0, 9)), tensors, {**options, "max_global_tokens": 0}, leaves,
        "blocked",
    )  # fmt: skip
    for a, b in zip(limited, plain):
        torch.testing.assert_close(a, b)
