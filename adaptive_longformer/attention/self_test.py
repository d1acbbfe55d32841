"""A small problem that a kernel has to get right on a device before it is used there."""

from collections.abc import Callable

import torch

from adaptive_longformer.attention.call import AttentionCall
from adaptive_longformer.attention.reference import reference_attention
from adaptive_longformer.patterns.block_layout import block_layout
from adaptive_longformer.patterns.sliding_window import SlidingWindow


def largest_error(
    run: Callable[[AttentionCall], tuple[torch.Tensor, torch.Tensor]],
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    query_block_size: int,
) -> float:
    """The largest relative error of output and gradients, against float64.

    Args:
        run: gives output and log-sum-exp of a call.
        device, dtype: of the tensors.
        head_dim: of the tensors.
        query_block_size: of the lists; their key blocks have 64 tokens.
    """
    window = SlidingWindow(90)
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        tensors = [
            torch.randn(1, 2, 200, head_dim, generator=generator).to(device, dtype)
            for _ in range(4)
        ]
        query, key, value = (tensor.requires_grad_() for tensor in tensors[:3])
        layout = block_layout(window, 200, query_block_size=query_block_size, device=device)
        call = AttentionCall(query, key, value, head_dim**-0.5, layout=layout)
        output, _ = run(call)
        actual = [output, *torch.autograd.grad(output, (query, key, value), tensors[3])]
        exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
        call = AttentionCall(exact[0], exact[1], exact[2], head_dim**-0.5, pattern=window)
        output, _ = reference_attention(call)
        expected = [output, *torch.autograd.grad(output, exact[:3], exact[3])]
    ratios = [(a.double() - b).norm() / b.norm() for a, b in zip(actual, expected)]
    return torch.stack(ratios).amax().item()
