"""The weights of ranks and windows: against their formulas, and in Triton against PyTorch."""

import functools
import math

import pytest
import torch
from triton_on_cpu import compile_only, needs_triton, resources

from adaptive_longformer.selection import head_weights as module
from adaptive_longformer.selection.head_weights import (
    BUDGET_RAMP,
    MIN_WEIGHT,
    WINDOW_RAMP,
    HeadNumbers,
    head_weights,
    weights_operator,
)

NO_LIMIT = 2**31 - 1
NUM_BLOCKS, RADIUS = 5, 64


def numbers_of(strength=0.7, dtype=torch.float64):
    """Heads of all kinds: full, weak, closed, negative, at kinks, calibrated."""
    gate = torch.tensor([1.0, 0.25, 0.0, -0.5, 1.5, 0.75, 1e-7, 1.0])
    budget = torch.tensor([1.0, 0.5, 0.5, 1.0, -0.25, 0.3, 0.9, -3.0])
    span = torch.tensor([1.0, 0.5, 0.25, 0.0, -1.0, 2.0, 0.9, 0.4])
    budgets = torch.tensor([NO_LIMIT, NO_LIMIT, 4, 4, NO_LIMIT, 2, 0, 3])
    windows = torch.tensor([NO_LIMIT, 63, 20, NO_LIMIT, NO_LIMIT, 64, 40, 0])
    learned = (tensor.to(dtype).requires_grad_() for tensor in (gate, budget, span))
    return HeadNumbers(*learned, torch.tensor(strength, dtype=dtype), budgets, windows)


@pytest.mark.parametrize("strength", [1.0, 0.7, 1e-7, 0.0])
def test_weights_and_limits_are_those_of_the_formulas(strength):
    numbers = numbers_of(strength)
    weights = head_weights(numbers, NUM_BLOCKS, RADIUS)
    for head, values in enumerate(zip(*(tensor.tolist() for tensor in numbers[:3]), strict=True)):
        gate, budget, span = values
        most, limit = (int(limits[head]) for limits in numbers[4:])
        ranks = [
            strength * gate * min(max((budget * NUM_BLOCKS + BUDGET_RAMP - j) / BUDGET_RAMP, 0), 1)
            for j in range(1, NUM_BLOCKS + 1)
        ]
        logs = [0.0, *(math.log(max(weight, MIN_WEIGHT)) for weight in ranks)]
        assert weights.log_weights[head].tolist() == pytest.approx(logs, abs=1e-12)
        assert weights.rank_limit[head] == min(sum(weight > 0 for weight in ranks), most)
        length = RADIUS if strength == 0 else max(span * RADIUS, 1 - WINDOW_RAMP)
        if strength > 0 and limit < RADIUS:
            length = min(length, limit + 1 - WINDOW_RAMP)
        assert weights.span.length[head].item() == pytest.approx(length, abs=1e-12)
        seen = [d for d in range(RADIUS + 1) if WINDOW_RAMP + length - d > 0]
        assert weights.reach[head] == max(seen) == len(seen) - 1


def test_what_is_not_asked_for_is_not_computed():
    whole = head_weights(numbers_of(), NUM_BLOCKS, RADIUS)
    ranks, window = head_weights(numbers_of(), NUM_BLOCKS, 0), head_weights(numbers_of(), 0, RADIUS)
    assert torch.equal(ranks.log_weights, whole.log_weights)
    assert torch.equal(window.span.length, whole.span.length)
    assert ranks[2:] == window[:2] == (None, None)


def test_gradients_are_those_of_the_formulas_and_have_second_derivatives():
    numbers = numbers_of()
    # Away from kinks, where a derivative has no one value.
    learned = [torch.tensor(v, dtype=torch.float64) for v in ([0.9, 0.4], [0.43, 0.7], [0.9, 0.3])]
    rest = (numbers.strength, *(limits[:2] for limits in numbers[4:]))

    def results(*learned):
        weights = head_weights(HeadNumbers(*learned, *rest), NUM_BLOCKS, RADIUS)
        return weights.log_weights, weights.span.length

    learned = [tensor.requires_grad_() for tensor in learned]
    assert torch.autograd.gradcheck(results, learned)
    assert torch.autograd.gradgradcheck(results, learned)


def triton_weights(strength, dtype, order=1):
    """Results and gradients, in float64, of what a GPU runs or, without Triton's kernels, the
    definition; `order` 2 also gives those of the gradients.
    """
    numbers = numbers_of(strength, dtype)
    weights = head_weights(numbers, NUM_BLOCKS, RADIUS)
    results = [weights.log_weights, weights.rank_limit, weights.span.length, weights.reach]
    loss = sum((t * torch.arange(1, t.numel() + 1).view_as(t).sin()).sum() for t in results[::2])
    grads = torch.autograd.grad(loss, numbers[:3], create_graph=order > 1)
    found = [*results, *grads]
    if order > 1:
        total = sum(grad.square().sum() for grad in grads if grad.requires_grad)
        found += torch.autograd.grad(total, numbers[:2])
    return [tensor.detach().double() for tensor in found]


def in_triton(function, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "why_no_triton", lambda device: None)
        return globals()[function](*arguments)


def opcheck():
    numbers, sizes = list(numbers_of(dtype=torch.float32)), [NUM_BLOCKS, RADIUS]
    torch.library.opcheck(weights_operator, (numbers, sizes))
    numbers = [tensor.detach() for tensor in numbers]
    for grad in (torch.ones(8, 1 + NUM_BLOCKS), None):
        torch.library.opcheck(module.gradients_operator, (grad, torch.ones(8), numbers, sizes))


@pytest.fixture
def interpreted(triton_interpreter):
    return functools.partial(triton_interpreter, "test_head_weights", "in_triton")


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strength", [1.0, 0.7, 0.0])
def test_triton_gives_what_torch_gives(strength, dtype, interpreted):
    expected = triton_weights(strength, dtype)
    actual = interpreted("triton_weights", strength, dtype)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCES[dtype])


# Gradients are rounded to the type of the parameters.
TOLERANCES = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-6, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-6},
}


@needs_triton
def test_second_derivatives_are_those_of_the_definition(interpreted):
    expected = triton_weights(0.7, torch.float64, 2)
    for one, other in zip(interpreted("triton_weights", 0.7, torch.float64, 2), expected):
        torch.testing.assert_close(one, other)


@needs_triton
def test_operators_pass_opcheck(interpreted):
    interpreted("opcheck")


@needs_triton
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_kernels_compile_without_spilling_registers(capability):
    numbers = numbers_of(dtype=torch.bfloat16)
    with compile_only(capability) as compiled:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "why_no_triton", lambda device: None)
            weights = head_weights(numbers, 32, 256)
        (weights.log_weights.sum() + weights.span.length.sum()).backward()
    assert [name for name, _ in compiled] == ["head_weights_kernel", "head_gradients_kernel"]
    for name, kernel in compiled:
        assert resources(kernel)[1] == 0, name
