import pytest
import torch

from adaptive_longformer.baselines.linear import linear_attention


def draw(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, length, 8, generator=generator, dtype=torch.float64) for _ in "qkv"]


def dense(query, key, value, mask, is_causal):
    """The definition, one weight for each pair."""
    phi = [torch.where(tensor > 0, tensor + 1, tensor.exp()) for tensor in (query, key)]
    weights = phi[0] @ phi[1].transpose(-1, -2) * mask[:, None, None, :]
    if is_causal:
        weights = weights.tril()
    total = weights.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, weights @ value / total.clamp(min=1e-300), 0.0)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 131])
def test_linear_attention_equals_its_definition(length, is_causal):
    query, key, value = (tensor.requires_grad_() for tensor in draw(length))
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, : length // 3] = False
    output = linear_attention(query, key, value, attention_mask=mask, is_causal=is_causal)
    expected = dense(query, key, value, mask, is_causal)
    torch.testing.assert_close(output, expected)
    gradient = torch.randn_like(output)
    actual = torch.autograd.grad(output, (query, key, value), gradient)
    for ours, theirs in zip(
        actual, torch.autograd.grad(expected, (query, key, value), gradient), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_row_that_sees_nothing_is_zero():
    query, key, value = draw(5)
    value[0, :, 2] = torch.nan  # padding may hold anything
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1] = True
    output = linear_attention(query, key, value, attention_mask=mask)
    assert torch.equal(output[0], torch.zeros_like(output[0]))
    assert output[1].isfinite().all() and output[1].any()
