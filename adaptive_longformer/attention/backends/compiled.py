"""The compiled backends "cpp" and "cuda": block-sparse attention by our own kernels, built at the
first use.
"""

import torch

from adaptive_longformer.attention.backends import cpp as compiled_cpu
from adaptive_longformer.attention.backends import cuda as compiled_cuda
from adaptive_longformer.attention.backends.self_test import why_wrong
from adaptive_longformer.attention.call import AttentionCall
from adaptive_longformer.attention.kernels.cuda_launches import (
    ELEMENT_TYPES,
    HEAD_DIMS,
    KEY_BLOCK_SIZE,
    QUERY_BLOCK_SIZES,
    shared_memory_bytes,
)
from adaptive_longformer.attention.kernels.load import until_forgotten, why_unavailable
from adaptive_longformer.attention.operator import (
    DEFAULT_BLOCK_SIZE,
    OperatorArguments,
    define_operator,
    run_operator,
)
from adaptive_longformer.patterns.block_layout import split_window
from adaptive_longformer.patterns.random_blocks import RandomBlocks

# The second and the third size of a grid.
_MOST_REPEATS = 65535


def cpp_supports(call: AttentionCall) -> str | None:
    """None, or why the C++ kernel for CPUs cannot run the call. Builds the kernel if need be."""
    if call.query.device.type != "cpu":
        return f"tensors are on {call.query.device}, the kernel is for CPUs"
    if call.query.dtype not in compiled_cpu.ELEMENT_TYPES:
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
    query_block, key_block = block_sizes(call)
    if query_block not in QUERY_BLOCK_SIZES or key_block != KEY_BLOCK_SIZE:
        return f"blocks of {query_block} x {key_block} tokens, 64 x 64 or 128 x 64 is needed"
    if max(query.shape[:2]) > _MOST_REPEATS:
        return (
            f"batch x heads is {query.shape[0]} x {query.shape[1]}, at most {_MOST_REPEATS} each "
            "is allowed"
        )
    if not call.scale > 0:
        return f"scale is {call.scale}, a number above 0 is needed"
    if layout is not None and layout.key_blocks.numel() >= 2**31:
        return "the layout has 2**31 entries or more"
    return why_not_whole_blocks(call) or _why_no_cuda_library(
        query.device.index or 0, query.dtype, query.shape[3], query_block
    )


def run_compiled(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [batch, heads, length, head_dim] and log-sum-exp [batch, heads, length] of a call."""
    return run_operator(compiled_attention, call)


def block_sizes(call: AttentionCall) -> tuple[int, int]:
    """Tokens of the query blocks and the key blocks of a call's lists."""
    if call.layout is None:
        return DEFAULT_BLOCK_SIZE, DEFAULT_BLOCK_SIZE
    return call.layout.query_block_size, call.layout.key_block_size


def why_not_whole_blocks(call: AttentionCall) -> str | None:
    """None if the pattern beside the window lets all or no pairs of a tile through, or why not."""
    pattern = call.layout.pattern if call.layout is not None else None
    if call.pattern is not None:
        pattern = split_window(call.pattern)[1]
    query_block, key_block = block_sizes(call)
    for part in pattern.parts if pattern is not None else ():
        is_aligned = (
            isinstance(part, RandomBlocks)
            and part.block_size % query_block == 0
            and part.block_size % key_block == 0
        )
        if not is_aligned:
            return f"{part.spec} is not made of whole blocks of {query_block} x {key_block} tokens"
    return None


# torch.compile takes the answers as constants instead of tracing a build.
@torch.compiler.assume_constant_result
def _why_no_cpu_library() -> str | None:
    return why_unavailable("cpu")


@torch.compiler.assume_constant_result
def _why_no_cuda_library(
    device: int, dtype: torch.dtype, head_dim: int, query_block: int
) -> str | None:
    return _check_cuda_kernel(device, dtype, head_dim, query_block)


@until_forgotten
def _check_cuda_kernel(
    device: int, dtype: torch.dtype, head_dim: int, query_block: int
) -> str | None:
    """None if this device can run the kernel and gets a small problem right, else the reason."""
    properties = torch.cuda.get_device_properties(device)
    if properties.major < 8:
        return f"compute capability {properties.major}.{properties.minor}, 8.0 is needed"
    reason = why_unavailable("cuda")
    if reason is not None:
        return reason
    needed = max(shared_memory_bytes(head_dim, query_block).values())
    if needed > properties.shared_memory_per_block_optin:
        return (
            f"{needed} bytes of shared memory are needed, the device has "
            f"{properties.shared_memory_per_block_optin}"
        )
    return why_wrong(
        "cuda", run_compiled, torch.device("cuda", device), dtype, head_dim, query_block
    )


def _kernels(arguments: OperatorArguments):
    return compiled_cuda if arguments.query.is_cuda else compiled_cpu


def _forward(arguments: OperatorArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp by the compiled kernel of the query's device."""
    return _kernels(arguments).forward(arguments)


def _backward(
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    arguments: OperatorArguments,
) -> tuple[torch.Tensor, ...]:
    return _kernels(arguments).backward(grad_output, grad_lse, output, lse, arguments)


compiled_attention = define_operator("compiled_attention", _forward, _backward)
