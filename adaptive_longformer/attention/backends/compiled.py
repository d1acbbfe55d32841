"""The compiled backends "cpp" and "cuda": block-sparse attention by our own kernels, built at the
first use.
"""

import torch

from adaptive_longformer.attention.backends import cpp, cuda
from adaptive_longformer.attention.backends.self_test import why_wrong
from adaptive_longformer.attention.backends.triton import why_no_lists
from adaptive_longformer.attention.call import AttentionCall
from adaptive_longformer.attention.kernels.cuda_launches import (
    BLOCK_SIZES,
    ELEMENT_TYPES,
    HEAD_DIMS,
    KEY_BLOCK_SIZE,
    shared_memory_bytes,
)
from adaptive_longformer.attention.kernels.kernel_call import why_not_whole_blocks
from adaptive_longformer.attention.kernels.load import until_forgotten, why_unavailable
from adaptive_longformer.attention.kernels.triton_device import why_no_triton
from adaptive_longformer.attention.operator import define_operator, fits_graphs, run_operator

# The second and the third size of a grid.
_MOST_REPEATS = 65535


def cpp_supports(call: AttentionCall) -> str | None:
    """None, or why the C++ kernel for CPUs cannot run the call. Builds the kernel if need be."""
    if call.query.device.type != "cpu":
        return f"tensors are on {call.query.device}, the kernel is for CPUs"
    if call.query.dtype not in cpp.ELEMENT_TYPES:
        return f"{call.query.dtype} is not one of float32, bfloat16 and float16"
    return why_not_whole_blocks(call) or _why_no_cpu_library()


def cuda_supports(call: AttentionCall) -> str | None:
    """None, or why the CUDA kernel cannot run the call. Builds and checks the kernel if need be."""
    query, layout = call.query, call.layout
    if query.device.type != "cuda":
        return f"tensors are on {query.device}, the kernel is for CUDA devices"
    if query.dtype not in ELEMENT_TYPES:
        return f"{query.dtype} is not one of bfloat16 and float16"
    if query.shape[3] not in HEAD_DIMS:
        return f"head_dim {query.shape[3]} is not one of {HEAD_DIMS}"
    query_block, key_block = call.block_sizes
    if (query_block, key_block) not in BLOCK_SIZES:
        return f"blocks of {query_block} x {key_block} tokens, one of {BLOCK_SIZES} is needed"
    if max(query.shape[:2]) > _MOST_REPEATS:
        return (
            f"batch x heads is {query.shape[0]} x {query.shape[1]}, at most {_MOST_REPEATS} each "
            "is allowed"
        )
    if not call.scale > 0:
        return f"scale is {call.scale}, a number above 0 is needed"
    if layout is not None and layout.key_blocks.numel() >= 2**31:
        return "the layout has 2**31 entries or more"
    if key_block < KEY_BLOCK_SIZE and (reason := why_no_lists(call)) is not None:
        return reason
    return why_not_whole_blocks(call) or _why_no_cuda_library(
        query.device.index or 0, query.dtype, query.shape[3], query_block, key_block
    )


def run_compiled(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [batch, heads, length, head_dim] and log-sum-exp [batch, heads, length] of a call."""
    return run_operator(_in_graphs if fits_graphs(call) else compiled_attention, call)


# torch.compile takes the answers as constants instead of tracing a build.
@torch.compiler.assume_constant_result
def _why_no_cpu_library() -> str | None:
    return why_unavailable("cpu")


@torch.compiler.assume_constant_result
def _why_no_cuda_library(
    device: int, dtype: torch.dtype, head_dim: int, query_block: int, key_block: int
) -> str | None:
    return _check_cuda_kernel(device, dtype, head_dim, query_block, key_block)


@until_forgotten
def _check_cuda_kernel(
    device: int, dtype: torch.dtype, head_dim: int, query_block: int, key_block: int
) -> str | None:
    """None if this device can run the kernel and gets a small problem right, else the reason."""
    is_small = key_block < KEY_BLOCK_SIZE
    properties = torch.cuda.get_device_properties(device)
    if properties.major < 8:
        return f"compute capability {properties.major}.{properties.minor}, 8.0 is needed"
    reason = why_unavailable("cuda")
    if reason is not None:
        return reason
    if is_small and (reason := why_no_triton(torch.device("cuda", device))) is not None:
        return f"{reason}, and the lists of blocks below 64 are made in Triton"
    rows = KEY_BLOCK_SIZE if is_small else query_block
    needed = max(shared_memory_bytes(head_dim, rows, is_small).values())
    if needed > properties.shared_memory_per_block_optin:
        return (
            f"{needed} bytes of shared memory are needed, the device has "
            f"{properties.shared_memory_per_block_optin}"
        )
    return why_wrong(
        "cuda", run_compiled, torch.device("cuda", device), dtype, head_dim, query_block, key_block
    )


def _kernels(call: AttentionCall):
    return cuda if call.query.is_cuda else cpp


def _forward(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp by the compiled kernel of the query's device."""
    return _kernels(call).forward(call)


def _backward(
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    call: AttentionCall,
) -> tuple[torch.Tensor | None, ...]:
    return _kernels(call).backward(grad_output, grad_lse, output, lse, call)


compiled_attention = define_operator("compiled_attention", _forward, _backward)
_in_graphs = define_operator("compiled_attention_in_graphs", _forward, _backward, ())
