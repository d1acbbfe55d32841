# type: ignore  (a kernel's types are Triton's)
"""The weights of `head_weights.py` and their gradients in one kernel each: a program per head."""

import torch
import triton
import triton.language as tl

from adaptive_longformer.attention.reference import MIN_WEIGHT
from adaptive_longformer.selection.head_weights import BUDGET_RAMP, WINDOW_RAMP

_MIN_WEIGHT = tl.constexpr(MIN_WEIGHT)
_BUDGET_RAMP = tl.constexpr(BUDGET_RAMP)
_WINDOW_RAMP = tl.constexpr(WINDOW_RAMP)


def launch(kernel, numbers, sizes, *others) -> None:
    """Runs one of the two kernels.

    Args:
        numbers: `HeadNumbers`.
        sizes: num_blocks and radius of `head_weights`.
        others: tuples of tensors, None for those that there are not: first what the results are
            computed from besides, if anything, then the results.
    """
    numbers, *others = (
        tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)
        for tensors in (numbers, *others)
    )
    columns = triton.next_power_of_2(1 + sizes[0])
    with torch.cuda.device_of(numbers[0]):
        kernel[numbers[0].numel(),](numbers, *sizes, *others, columns, num_warps=1)


@triton.jit
def _budget_weight(budget, num_blocks, column):
    """Of every column's rank, not clamped."""
    return budget * (num_blocks / _BUDGET_RAMP) + (_BUDGET_RAMP - column) / _BUDGET_RAMP


@triton.jit
def _longest(head_windows, radius):
    """What a calibrated window leaves of a span: no weight one token beyond it."""
    longest = head_windows + (1.0 - _WINDOW_RAMP)
    return tl.where(head_windows < radius, longest, float("inf"))


@triton.jit(do_not_specialize=["num_blocks", "radius"])
def head_weights_kernel(numbers, num_blocks, radius, results, COLUMNS: tl.constexpr):
    """A program computes what `HeadWeights` says of a head."""
    gate, budget, span, strength, head_budgets, head_windows = numbers
    log_weights, rank_limit, out_span, reach = results
    dtype: tl.constexpr = log_weights.dtype.element_ty
    head, column = tl.program_id(0), tl.arange(0, COLUMNS)
    opening = tl.load(strength).to(dtype) * tl.load(gate + head).to(dtype)
    weight = _budget_weight(tl.load(budget + head).to(dtype), num_blocks, column)
    weight = tl.clamp(weight, 0.0, 1.0) * opening
    is_rank = (column > 0) & (column <= num_blocks)
    least = tl.full([], _MIN_WEIGHT, dtype)  # some versions of Triton round a literal to float32
    log_weight = tl.where(is_rank, tl.log(tl.maximum(weight, least)), 0.0)
    tl.store(log_weights + head * (1 + num_blocks) + column, log_weight, mask=column <= num_blocks)
    limit = tl.sum((is_rank & (weight > 0)).to(tl.int64), 0)
    tl.store(rank_limit + head, tl.minimum(limit, tl.load(head_budgets + head)))

    longest = _longest(tl.load(head_windows + head), radius)
    length = tl.maximum(tl.load(span + head).to(dtype) * radius, 1.0 - _WINDOW_RAMP)
    length = tl.minimum(length, longest)
    length = tl.where(tl.load(strength) > 0, length, radius).to(dtype)
    tl.store(out_span + head, length)
    tl.store(reach + head, tl.minimum(tl.ceil(length + (_WINDOW_RAMP - 1.0)), radius).to(tl.int64))


@triton.jit(do_not_specialize=["num_blocks", "radius"])
def head_gradients_kernel(numbers, num_blocks, radius, grads, results, COLUMNS: tl.constexpr):
    """A program computes the gradients of a head's gate, budget and span from those of log_weights
    and of the length of the span.
    """
    gate, budget, span, strength, _, head_windows = numbers
    grad_weights, grad_span = grads
    grad_gate, grad_budget, out_span = results
    dtype: tl.constexpr = tl.float64 if gate.dtype.element_ty == tl.float64 else tl.float32
    head, column = tl.program_id(0), tl.arange(0, COLUMNS)
    strength = tl.load(strength).to(dtype)
    opening = strength * tl.load(gate + head).to(dtype)
    ramp = _budget_weight(tl.load(budget + head).to(dtype), num_blocks, column)
    weight = tl.clamp(ramp, 0.0, 1.0)
    of_gate = tl.zeros([COLUMNS], dtype)
    of_budget = tl.zeros([COLUMNS], dtype)
    if grad_weights is not None:
        least = tl.full([], _MIN_WEIGHT, dtype)
        is_rank = (column > 0) & (column <= num_blocks) & (weight * opening >= least)
        pointer = grad_weights + head * (1 + num_blocks) + column
        # Of the weight, not of its logarithm.
        grad = tl.load(pointer, mask=is_rank, other=0.0)
        grad = tl.where(is_rank, grad / tl.where(is_rank, weight * opening, 1.0), 0.0)
        of_gate = grad * weight * strength
        of_budget = tl.where(ramp <= 1.0, grad * opening * (num_blocks / _BUDGET_RAMP), 0.0)
    tl.store(grad_gate + head, tl.sum(of_gate, 0).to(grad_gate.dtype.element_ty))
    tl.store(grad_budget + head, tl.sum(of_budget, 0).to(grad_budget.dtype.element_ty))

    of_span = tl.zeros([], dtype)
    if grad_span is not None:
        length = tl.load(span + head).to(dtype) * radius
        is_learned = (length >= 1.0 - _WINDOW_RAMP) & (strength > 0)
        is_learned = is_learned & (length <= _longest(tl.load(head_windows + head), radius))
        of_span = tl.where(is_learned, tl.load(grad_span + head) * radius, of_span)
    tl.store(out_span + head, of_span.to(out_span.dtype.element_ty))
