"""Derivatives that kernels do not have: second ones, and those in forward mode."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad


def with_second_derivatives(
    results: Sequence[torch.Tensor], definition: Callable[..., Sequence[torch.Tensor]], *arguments
) -> Sequence[torch.Tensor]:
    """The results, which a backward pass with create_graph=True differentiates by their definition.

    Every other backward pass goes through the kernels. torch.compile has no second derivatives.

    Args:
        results: what a kernel has computed from the arguments.
        definition: gives the same and perhaps more, in operations that autograd knows.
        arguments: tensors and other things.
    """
    if torch.compiler.is_compiling() or not any(result.requires_grad for result in results):
        return results
    return _Defined.apply(definition, len(results), *results, *arguments)  # type: ignore[return-value]


def has_tangents(*tensors: torch.Tensor) -> bool:
    """Whether forward-mode derivatives are asked for, which a kernel would silently give as 0."""
    if torch.compiler.is_compiling():
        return False
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


class _Defined(torch.autograd.Function):
    """Results as they are. Their gradients go on to them, or to the arguments of the definition."""

    @staticmethod
    def forward(definition: Callable, count: int, *tensors: torch.Tensor) -> tuple[Any, ...]:
        return tuple(result.view_as(result) for result in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.definition, ctx.count, *rest = inputs
        arguments = rest[ctx.count :]
        # Only what is saved in this way can be dropped by activation checkpointing.
        ctx.save_for_backward(*(a if isinstance(a, torch.Tensor) else None for a in arguments))
        ctx.others = [None if isinstance(a, torch.Tensor) else a for a in arguments]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return None, None, *gradients, *[None] * len(ctx.others)
        arguments = [
            other if tensor is None else tensor
            for tensor, other in zip(ctx.saved_tensors, ctx.others, strict=True)
        ]
        is_needed = ctx.needs_input_grad[2 + ctx.count :]
        # Views, since one of the arguments may have been computed from another one.
        views = {
            i: arguments[i].view_as(arguments[i]) for i, needed in enumerate(is_needed) if needed
        }
        results = ctx.definition(*(views.get(i, a) for i, a in enumerate(arguments)))[: ctx.count]
        found = torch.autograd.grad(
            results, list(views.values()), gradients, create_graph=True, allow_unused=True
        )
        by_argument = dict(zip(views, found, strict=True))
        return None, None, *[None] * ctx.count, *map(by_argument.get, range(len(arguments)))
