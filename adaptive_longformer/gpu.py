"""Whether there is a GPU, and in which type models are best computed on it."""

from typing import cast

import torch
from transformers import PreTrainedModel


def has_bfloat16_gpu() -> bool:
    """Whether there is a GPU that computes in bfloat16 (compute capability 8.0 or newer), as our
    kernels for GPUs need it.
    """
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8


def move_to_gpu(model: PreTrainedModel) -> str | None:
    """Moves a model that is only read to the GPU, if there is one: one in float32 becomes bfloat16,
    where the GPU computes in it.

    Returns:
        Where the model is then and in which type, or None if there is no GPU.
    """
    if not torch.cuda.is_available():
        return None
    is_cast = model.dtype == torch.float32 and has_bfloat16_gpu()
    dtype = torch.bfloat16 if is_cast else model.dtype
    # The types of Transformers lose what the method belongs to.
    cast(torch.nn.Module, model).to("cuda", dtype)
    return f"{torch.cuda.get_device_name()}, {str(model.dtype).removeprefix('torch.')}"
