"""The operators in two processes: a layer that is used twice in one forward pass, under DDP."""

import sys

import pytest
import torch
from torch import nn

from adaptive_longformer.attention import GlobalProjections, sparse_attention
from adaptive_longformer.patterns import SlidingWindow
from adaptive_longformer.testing import run_two_processes

HEADS, SIZE, LENGTH = 2, 16, 70


class Attention(nn.Module):
    """Self-attention with separate global projections, all of whose weights are trained."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(6, SIZE, SIZE, generator=generator, dtype=torch.float64) / 4
        self.weights = nn.ParameterList(list(weights))

    def forward(self, hidden_states, global_mask):
        query, key, value, *separate = self.weights
        heads = [
            nn.functional.linear(hidden_states, weight).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for weight in (query, key, value)
        ]
        projections = GlobalProjections(
            hidden_states, separate[0], None, separate[1], None, separate[2], None
        )
        output = sparse_attention(
            *heads, SlidingWindow(5), global_mask=global_mask, global_qkv=projections,
            backend="blocked",
        )  # fmt: skip
        return output.transpose(1, 2).flatten(2)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()

    def forward(self, hidden_states, global_mask):
        once = self.attention(hidden_states, global_mask) + hidden_states
        return self.attention(once, global_mask)


def batch(rank):
    """Only the first process has a global token."""
    generator = torch.Generator().manual_seed(rank)
    states = torch.randn(1, LENGTH, SIZE, generator=generator, dtype=torch.float64)
    return states, (torch.arange(LENGTH) == 0)[None] & (rank == 0)


def gradients(module, ranks):
    loss = sum(module(*batch(rank)).square().mean() for rank in ranks) / len(ranks)
    loss.backward()
    return [parameter.grad.clone() for parameter in module.parameters()]


def _train(rank, folder):
    replica = nn.parallel.DistributedDataParallel(Twice())
    for _ in range(2):  # the second step fails if the first one missed a gradient
        replica.zero_grad()
        grads = gradients(replica, [rank])
    torch.save(grads, folder / f"{rank}.pt")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="starts processes that talk over gloo")
def test_a_layer_used_twice_gets_the_gradients_of_the_whole_batch(tmp_path):
    run_two_processes(_train, tmp_path)
    expected = gradients(Twice(), [0, 1])
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected)
