"""Which CUDA kernels a call launches, and with which grid, threads and shared memory."""

import ctypes
import itertools
from typing import Any

import torch

# In the order of `KernelName` in csrc/cuda/launch.cuh.
KERNELS = ("forward", "row_sums", "grad_small_keys", "grad_keys", "add_parts", "grad_queries")
ELEMENT_TYPES = {torch.bfloat16: 1, torch.float16: 2}
HEAD_DIMS = (32, 64, 96, 128)
# Tokens of a tile of keys, and of a piece, which is copied and masked as a whole.
KEY_BLOCK_SIZE, PIECE = 64, 16
# Tokens of query blocks and key blocks: those of a tile, and small ones, put together to tiles.
BLOCK_SIZES = ((64, 64), (128, 64), *itertools.product((16, 32, 64, 128), (16, 32)))
_QUERY_PART = 64
_HALF, _FLOAT = 2, 4
# Steps that are kept in shared memory, and the bytes of each.
_STEPS, _STEP = 64, 16


class Launch(ctypes.Structure):
    """`Launch` of csrc/cuda/launch.cuh: a kernel, its grid, threads of a block and bytes of shared
    memory.
    """

    _fields_ = [
        (name, ctypes.c_int)
        for name in ("kernel", "grid_x", "grid_y", "grid_z", "threads", "shared_memory")
    ]

    @property
    def name(self) -> str:
        return KERNELS[self.kernel]


def forward_launches(arguments: Any) -> list[Launch]:
    """The launches of a forward pass, for the argument struct of a call."""
    return [_over_lists("forward", arguments)]


def backward_launches(arguments: Any) -> list[Launch]:
    """The launches of a backward pass, in their order."""
    batches, heads = _repeats(arguments)
    rows = arguments.num_query_blocks * arguments.query_block_size
    grids = {
        "row_sums": (rows // _QUERY_PART, arguments.heads, arguments.batch),
        "grad_small_keys": (
            arguments.small_slots * arguments.small_key_block // PIECE, batches, heads,
        ),
        "grad_keys": (arguments.num_items, batches, heads),
        "add_parts": (
            arguments.list_batches * arguments.list_heads * arguments.num_blocks, batches, heads,
        ),
    }  # fmt: skip
    if arguments.small_slots == 0:
        del grids["grad_small_keys"]
    if arguments.num_slots == 0:
        del grids["add_parts"]
    shared_memory = _shared_memory(arguments)
    launches = [
        Launch(KERNELS.index(name), *grid, 128, shared_memory[name]) for name, grid in grids.items()
    ]
    return [*launches, _over_lists("grad_queries", arguments)]


def shared_memory_bytes(
    head_dim: int, query_block_size: int, is_small: bool = False
) -> dict[str, int]:
    """What a thread block of each kernel needs; csrc/cuda says what lies there.

    Args:
        head_dim: of the tensors.
        query_block_size: rows of a tile of queries.
        is_small: whether the blocks of the lists are smaller than a tile.
    """
    keys, row, steps = KEY_BLOCK_SIZE, head_dim * _HALF, _STEPS * _STEP
    warps = query_block_size // 16
    of_lists = steps + (_STEPS * warps * _FLOAT if is_small else 0)
    rows = 4 * _QUERY_PART * (row + _FLOAT)
    return {
        "forward": (query_block_size + 4 * keys) * row + of_lists,
        "row_sums": 0,
        "grad_small_keys": 2 * PIECE * row + rows + steps,
        "grad_keys": 2 * keys * row + rows + steps,
        "add_parts": 0,
        "grad_queries": (2 * query_block_size + 4 * keys) * row
        + of_lists + (_STEPS + warps) * _FLOAT,
    }  # fmt: skip


def _over_lists(name: str, arguments: Any) -> Launch:
    """One thread block for each list and each batch row and head that shares it."""
    lists = arguments.list_batches * arguments.list_heads * arguments.num_query_blocks
    shared_memory = _shared_memory(arguments)[name]
    threads = arguments.query_block_size * 2
    return Launch(KERNELS.index(name), lists, *_repeats(arguments), threads, shared_memory)


def _shared_memory(arguments: Any) -> dict[str, int]:
    is_small = arguments.small_query_block > 0
    return shared_memory_bytes(arguments.head_dim, arguments.query_block_size, is_small)


def _repeats(arguments: Any) -> tuple[int, int]:
    """How many batch rows and heads share a list."""
    return (
        arguments.batch // max(arguments.list_batches, 1),
        arguments.heads // max(arguments.list_heads, 1),
    )
