"""Gradients of zero for what took no part in a computation."""

import torch


class JoinGradients(torch.autograd.Function):
    """The first tensor as it is; zeros as gradients of the others.

    DistributedDataParallel waits for every parameter's gradient, also where its branch did not run.
    """

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*others)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):  # type: ignore[override]
        zeros = [
            torch.zeros_like(other) if needed else None
            for other, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        ]
        return grad, *zeros
