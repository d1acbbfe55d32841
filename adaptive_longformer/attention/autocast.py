"""How the operator behaves under torch.autocast: as torch's scaled_dot_product_attention does."""

import functools
from collections.abc import Callable

import torch

_DEVICES = ("cpu", "cuda", "mps", "xpu")


def autocast_inputs(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in autocast's type, or as they are where autocast is off.

    Like every operation that runs in low precision, it leaves float64 alone.

    Args:
        tensors: query, key and value, whatever their types.
    """
    device = tensors[0].device.type
    if device not in _DEVICES or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
        for tensor in tensors
    )


def without_autocast(function: Callable) -> Callable:
    """Makes a function whose first argument is a tensor compute in the types that it chose itself.

    The inside of an operator is not autocast's business: it would turn products that are float32 on
    purpose into bfloat16, in the backward pass also depending on where `backward()` is called.
    """

    @functools.wraps(function)
    def run(tensor: torch.Tensor, *arguments, **options):
        with torch.autocast(tensor.device.type, enabled=False):
            return function(tensor, *arguments, **options)

    return run
