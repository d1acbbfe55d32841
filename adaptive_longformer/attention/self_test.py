"""A small problem that a kernel has to get right on a device before it is used there."""

import logging
from collections.abc import Callable

import torch

from adaptive_longformer.attention.call import AttentionCall
from adaptive_longformer.attention.reference import reference_attention
from adaptive_longformer.patterns.block_layout import block_layout
from adaptive_longformer.patterns.sliding_window import SlidingWindow

logger = logging.getLogger(__name__)
# The largest relative error of a kernel that is right, in half precision.
_TOLERANCE = 0.02


def why_wrong(
    name: str,
    run: Callable[[AttentionCall], tuple[torch.Tensor, torch.Tensor]],
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    query_block_size: int,
) -> str | None:
    """None if a backend gets a small problem right, else the reason, which is also logged.

    Args:
        name: of the backend.
        run, device, dtype, head_dim, query_block_size: see `largest_error`.

    Raises:
        torch.OutOfMemoryError: there was no memory for it, which says nothing of the kernel.
    """
    try:
        error = largest_error(run, device, dtype, head_dim, query_block_size)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, ImportError) as problem:
        reason = f"its self-test could not run: {str(problem).splitlines()[0]}"
    else:
        if error < _TOLERANCE:
            return None
        reason = f"it failed its self-test, with a relative error of {error}"
    logger.warning("Attention backend %r is not used on %s: %s", name, device, reason)
    return reason


def largest_error(
    run: Callable[[AttentionCall], tuple[torch.Tensor, torch.Tensor]],
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    query_block_size: int,
) -> float:
    """The largest relative error of output and gradients, against float64.

    The caller's inference mode, autocast and default device do not matter.

    Args:
        run: gives output and log-sum-exp of a call.
        device, dtype: of the tensors.
        head_dim: of the tensors.
        query_block_size: of the lists; their key blocks have 64 tokens.
    """
    window = SlidingWindow(90)
    generator = torch.Generator("cpu").manual_seed(0)
    quiet = torch.autocast(device.type, enabled=False)
    with torch.inference_mode(False), torch.enable_grad(), quiet, device:
        tensors = [
            torch.randn(1, 2, 200, head_dim, generator=generator, device="cpu").to(device, dtype)
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
