import pytest
import torch

from adaptive_longformer.selection.means import run_means


@pytest.mark.parametrize("length", [1, 15, 16, 37, 64])
@pytest.mark.parametrize("kind", ["none", "members", "numbers"])
def test_means_are_those_of_what_counts(kind, length):
    """A run of members, of none, of some; what does not count may hold anything."""
    generator = torch.Generator().manual_seed(length)
    tensor = torch.randn(2, 3, length, 5, generator=generator)
    counts = torch.ones(2, length)
    if kind != "none":
        counts[0, length // 3 : length // 3 + 20] = 0.0
        counts[1, 0] = 0.0
    if kind == "numbers":
        counts *= torch.randint(1, 5, counts.shape, generator=generator)
    expected = torch.zeros(2, 3, -(-length // 16), 5, dtype=torch.float64)
    for row in range(expected.shape[2]):
        run = slice(row * 16, row * 16 + 16)
        weight = counts[:, None, run, None].double()
        expected[:, :, row] = (tensor[:, :, run] * weight).sum(2) / weight.sum(2).clamp(min=1)
    tensor.masked_fill_(counts[:, None, :, None] == 0, torch.nan)
    given = {"none": None, "members": counts.bool(), "numbers": counts}[kind]
    means, sums = run_means(tensor, given, 16)
    torch.testing.assert_close(means, expected.float(), atol=1e-6, rtol=1e-6)
    expected_sums = torch.stack([run.sum(dim=1) for run in counts.split(16, dim=1)], dim=1)
    assert torch.equal(sums.expand(2, -1), expected_sums)


@pytest.mark.parametrize("length", [0, 40])
def test_means_of_a_transposed_tensor_and_of_nothing(length):
    tensor = torch.randn(2, length, 3, 5).transpose(1, 2)
    is_member = torch.arange(length) % 7 > 0
    one = run_means(tensor, is_member.expand(2, -1), 16)
    other = run_means(tensor.contiguous(), is_member.float().expand(2, -1), 16)
    for actual, expected in zip(one, other, strict=True):
        torch.testing.assert_close(actual, expected)
