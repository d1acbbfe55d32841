"""The PyTorch backends on a CUDA device: `make gpu`."""

import pytest
import torch
from calls import random_call, value_and_gradients

from adaptive_longformer.patterns import SlidingWindow, Strided

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]


def to_device(call, dtype):
    """The same call with its floating-point tensors in another type, on the device."""
    tensors, options, leaves = call
    moved = {id(leaf): leaf.detach().to(DEVICE, dtype).requires_grad_() for leaf in leaves}
    options = dict(options)
    for name, value in options.items():
        if isinstance(value, torch.Tensor):
            options[name] = value.to(DEVICE)
        elif isinstance(value, tuple):
            parts = [moved[id(part)] for part in value]
            options[name] = type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return [moved[id(tensor)] for tensor in tensors], options, list(moved.values())


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 3e-2), (torch.float16, 1e-2)],
    ids=str,
)
@pytest.mark.parametrize("length", [1, 63, 64, 65, 700])
@pytest.mark.parametrize("global_qkv", [None, "explicit", "absorbed"])
def test_blocked_on_the_device_matches_the_reference_on_the_cpu(
    global_qkv, length, dtype, tolerance
):
    pattern = SlidingWindow(33) | Strided(100)
    call = random_call(
        pattern,
        length=length,
        head_dim=32,
        padding="left",
        global_tokens="few",
        global_qkv=global_qkv,
        dropout_p=0.1,
    )
    for leaf in call[2]:  # the same rounded numbers on both sides
        leaf.data = leaf.data.to(dtype).double()
    expected = value_and_gradients(pattern, *call, "reference")
    actual = value_and_gradients(pattern, *to_device(call, dtype), "blocked")
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        error = float((a.cpu().double() - e.double()).abs().max())
        bound = tolerance * max(1.0, float(e.abs().max()))
        assert error <= bound, f"result {index}: error {error:.2e} above {bound:.2e}"
