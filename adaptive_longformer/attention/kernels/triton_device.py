"""Whether kernels in Triton can run on a device; only who launches one imports Triton."""

import importlib.util

import torch

from adaptive_longformer.attention.kernels.cache import KernelsUnavailableError, kernels_mode

# What kernels take for a side of a window that is longer: further than any token is.
FAR = 2**30
# Of a GPU: products of matrices in bfloat16, and copies that do not wait.
_LEAST_CAPABILITY = (8, 0)


def why_no_triton(device: torch.device) -> str | None:
    """None where Triton's kernels can run, else the reason. Waits for no device."""
    if device.type != "cuda":
        return f"the tensors are on {device.type!r}, Triton's kernels need 'cuda'"
    try:
        kernels_mode()
    except KernelsUnavailableError as error:
        return str(error)
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        found, least = (".".join(map(str, c)) for c in (capability, _LEAST_CAPABILITY))
        return f"the GPU has compute capability {found}, {least} is needed"
    return None
