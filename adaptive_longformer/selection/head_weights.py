"""How strongly every head reads the blocks that it chose, how many of them, and how wide its window
is: a few numbers per head, computed once per layer.
"""

import functools
from typing import NamedTuple

import torch

from adaptive_longformer.attention.call import AttentionSpan
from adaptive_longformer.attention.cuda_graphs import OUTSIDE_OF_GRAPHS
from adaptive_longformer.attention.kernels.triton_device import why_no_triton
from adaptive_longformer.attention.reference import MIN_WEIGHT
from adaptive_longformer.attention.second_derivatives import has_tangents, with_second_derivatives

# Over how many ranks a budget fades out, and over how many tokens a window does.
BUDGET_RAMP = 2.0
WINDOW_RAMP = 32.0


class HeadNumbers(NamedTuple):
    """What a layer has learned and what limits it.

    Attributes:
        gate, budget, span: [heads], see `HeadBudgets`.
        strength: scalar.
        head_budgets, head_windows: int64 [heads], see `HeadBudgets`.
    """

    gate: torch.Tensor
    budget: torch.Tensor
    span: torch.Tensor
    strength: torch.Tensor
    head_budgets: torch.Tensor
    head_windows: torch.Tensor


class HeadWeights(NamedTuple):
    """What follows from `HeadNumbers`, in float32 at least.

    Attributes:
        log_weights: [heads, 1 + num_blocks], 0 for the window, then the logarithms of the weights
            of the best, second best, ... block: a column per slot of `selection_layout`.
        rank_limit: int64 [heads], how many blocks have a weight above 0.
        span: the learned windows, None where nothing is asked about them. Their length is below 0
            where a window is shorter than the ramp; a token always sees itself.
        reach: int64 [heads], how many tokens to either side have a weight above 0; None as span.
    """

    log_weights: torch.Tensor | None = None
    rank_limit: torch.Tensor | None = None
    span: AttentionSpan | None = None
    reach: torch.Tensor | None = None


def precise(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def head_weights(numbers: HeadNumbers, num_blocks: int, radius: int) -> HeadWeights:
    """What follows from the numbers.

    Args:
        num_blocks: ranks of a full budget; 0: nothing is asked about them.
        radius: tokens to either side of a full window; 0: nothing is asked about windows.
    """
    if num_blocks == radius == 0:
        return HeadWeights()
    if why_no_triton(numbers.gate.device) is not None or has_tangents(*numbers[:3]):
        log_weights, limit = _ranks(numbers, num_blocks) if num_blocks else (None, None)
        length, reach = _window(numbers, radius) if radius else (None, None)
    else:
        log_weights, limit, length, reach = weights_operator(list(numbers), [num_blocks, radius])

        def definition(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            given = HeadNumbers(*tensors)
            return _ranks(given, num_blocks)[0], _window(given, radius)[0]

        log_weights, length = with_second_derivatives((log_weights, length), definition, *numbers)
    if radius == 0 or length is None:
        return HeadWeights(log_weights, limit)
    return HeadWeights(log_weights, limit, AttentionSpan(length, WINDOW_RAMP), reach)


def _ranks(numbers: HeadNumbers, num_blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """log_weights and rank_limit."""
    budget, opening = precise(numbers.budget), precise(numbers.strength) * precise(numbers.gate)
    ramp = torch.linspace(
        1 - 1 / BUDGET_RAMP, 1 - num_blocks / BUDGET_RAMP, num_blocks,
        dtype=budget.dtype, device=budget.device,
    )  # fmt: skip
    weight = torch.add(ramp, budget[:, None], alpha=num_blocks / BUDGET_RAMP).clamp(0.0, 1.0)
    weight = weight * opening[:, None]
    log_weights = torch.nn.functional.pad(weight.clamp(min=MIN_WEIGHT).log(), (1, 0))
    return log_weights, torch.minimum((weight > 0).sum(dim=-1), numbers.head_budgets)


def _window(numbers: HeadNumbers, radius: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The length of the span, [heads], and reach."""
    limit = numbers.head_windows
    # No weight is left one token beyond the calibrated window.
    longest = (limit + (1.0 - WINDOW_RAMP)).masked_fill(limit >= radius, torch.inf)
    length = (precise(numbers.span) * radius).clamp(min=1.0 - WINDOW_RAMP).clamp(max=longest)
    length = length.masked_fill(numbers.strength <= 0, radius)
    reach = (length.detach() + (WINDOW_RAMP - 1.0)).ceil().clamp(max=radius)
    return length, reach.long()


@torch.library.custom_op(
    "adaptive_longformer::head_weights", mutates_args=(), tags=OUTSIDE_OF_GRAPHS
)
def weights_operator(
    numbers: list[torch.Tensor], sizes: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """log_weights, rank_limit, the length of the span and reach in Triton, in one launch."""
    from adaptive_longformer.selection.triton_weights import head_weights_kernel, launch

    results = _empty_weights(numbers, sizes)
    launch(head_weights_kernel, numbers, sizes, results)
    return results


@weights_operator.register_fake
def _empty_weights(numbers, sizes):
    gate, *_, budgets, windows = numbers
    make = functools.partial(gate.new_empty, dtype=torch.promote_types(gate.dtype, torch.float32))
    limit, reach = torch.empty_like(budgets), torch.empty_like(windows)
    return make(len(gate), 1 + sizes[0]), limit, make(len(gate)), reach


@torch.library.custom_op(
    "adaptive_longformer::head_weights_backward", mutates_args=(), tags=OUTSIDE_OF_GRAPHS
)
def gradients_operator(
    grad_weights: torch.Tensor | None,
    grad_length: torch.Tensor | None,
    numbers: list[torch.Tensor],
    sizes: list[int],
) -> list[torch.Tensor]:
    """The gradients of gate, budget and span in Triton, in one launch."""
    from adaptive_longformer.selection.triton_weights import head_gradients_kernel, launch

    results = [torch.empty_like(number) for number in numbers[:3]]
    launch(head_gradients_kernel, numbers, sizes, (grad_weights, grad_length), results)
    return results


@gradients_operator.register_fake
def _(grad_weights, grad_length, numbers, sizes):
    return [torch.empty_like(number) for number in numbers[:3]]


def _setup_context(ctx, inputs, output) -> None:
    numbers, ctx.sizes = inputs
    ctx.save_for_backward(*numbers)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_weights, _, grad_length, __):
    grads = [None] * 3
    if grad_weights is not None or grad_length is not None:  # see `with_second_derivatives`
        grads = gradients_operator(grad_weights, grad_length, list(ctx.saved_tensors), ctx.sizes)
    return [*grads, None, None, None], None


weights_operator.register_autograd(_backward, setup_context=_setup_context)
