"""A small problem that a kernel has to get right on a device before it is used there."""

import logging
from collections.abc import Callable

import torch

from adaptive_longformer.attention.call import AttentionCall
from adaptive_longformer.attention.reference import reference_attention
from adaptive_longformer.patterns.block_layout import block_layout
from adaptive_longformer.patterns.random_blocks import RandomBlocks
from adaptive_longformer.patterns.sliding_window import SlidingWindow

logger = logging.getLogger(__name__)
# The largest relative error of a kernel that is right, in half precision.
TOLERANCE = 0.02


def why_wrong(
    name: str,
    run: Callable[[AttentionCall], tuple[torch.Tensor, torch.Tensor]],
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    query_block_size: int,
    key_block_size: int = 64,
) -> str | None:
    """None if a backend gets a small problem right, else the reason, which is also logged.

    Args:
        name: of the backend.
        run, device, dtype, head_dim, query_block_size, key_block_size: see `largest_error`.

    Raises:
        torch.OutOfMemoryError: there was no memory for it, which says nothing of the kernel.
        RuntimeError: a CUDA graph is being captured, which cannot hold it.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"the self-test of attention backend {name!r} cannot run while a CUDA graph is "
            "captured: call it once before"
        )
    try:
        error = largest_error(run, device, dtype, head_dim, query_block_size, key_block_size)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, ImportError) as problem:
        reason = f"its self-test could not run: {str(problem).splitlines()[0]}"
    else:
        if error < TOLERANCE:
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
    key_block_size: int = 64,
) -> float:
    """The largest relative error of output and gradients, against float64.

    The caller's inference mode, autocast, default device and hooks of saved tensors do not matter.

    Args:
        run: gives output and log-sum-exp of a call.
        device, dtype: of the tensors.
        head_dim: of the tensors.
        query_block_size, key_block_size: of the lists.
    """
    pattern, length = SlidingWindow(40) | RandomBlocks(1, 128), 400
    generator = torch.Generator("cpu").manual_seed(0)
    quiet = torch.autocast(device.type, enabled=False)
    # A checkpointed layer, in which the first call may be, counts what is saved for its backward
    # pass, and computes itself anew as soon as any of it is read.
    unhooked = torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved)
    with torch.inference_mode(False), torch.enable_grad(), quiet, unhooked, device:
        tensors = [
            torch.randn(1, 2, length, head_dim, generator=generator, device="cpu").to(device, dtype)
            for _ in range(4)
        ]
        query, key, value = (tensor.requires_grad_() for tensor in tensors[:3])
        layout = block_layout(
            pattern, length, query_block_size=query_block_size, key_block_size=key_block_size,
            device=device,
        )  # fmt: skip
        call = AttentionCall(query, key, value, head_dim**-0.5, layout=layout)
        output, _ = run(call)
        grads = torch.autograd.grad(output, (query, key, value), tensors[3])
        actual = [output.detach(), *grads]
        exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
        call = AttentionCall(exact[0], exact[1], exact[2], head_dim**-0.5, pattern=pattern)
        output, _ = reference_attention(call)
        expected = [output.detach(), *torch.autograd.grad(output, exact[:3], exact[3])]
    ratios = [(a.double() - b).norm() / b.norm() for a, b in zip(actual, expected)]
    return torch.stack(ratios).amax().item()
