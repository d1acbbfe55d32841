"""The backend "triton": block-sparse attention by kernels that Triton compiles at their first use.

Nothing in it reads a number back from the device: all sizes follow from shapes.
"""

import functools
import importlib
import os
from dataclasses import dataclass
from typing import Any

import torch

from adaptive_longformer.attention.backends.self_test import why_wrong
from adaptive_longformer.attention.call import AttentionCall
from adaptive_longformer.attention.dropout import threshold
from adaptive_longformer.attention.kernels.kernel_call import (
    check_shapes,
    gradients_of_biases,
    why_not_whole_blocks,
)
from adaptive_longformer.attention.kernels.load import until_forgotten
from adaptive_longformer.attention.kernels.triton_device import FAR, why_no_triton
from adaptive_longformer.attention.memory_format import like_projection
from adaptive_longformer.attention.operator import define_operator, fits_graphs, run_operator
from adaptive_longformer.patterns.block_layout import split_window
from adaptive_longformer.patterns.pattern import Pattern

BLOCK_SIZES = (16, 32, 64, 128)
HEAD_DIMS = range(16, 129, 8)
# Tokens of a tile of queries, in which smaller blocks are put together.
_QUERY_TILE = 64
# So many entries may the lists of a tile have: they are sorted in registers.
_MOST_ENTRIES = 4096
# Of a column of the transposed lists with more tiles of queries than this, parts are added up by
# themselves: a block that everyone reads would keep one processor busy alone.
_PART_TILES = 64
# Triton's interpreter takes tensors of the CPU, and gets products of bfloat16 wrong.
_INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
# Key blocks that `number_readers` looks at together.
_COLUMNS = 4096


def triton_supports(call: AttentionCall) -> str | None:
    """None, or why the Triton kernels cannot run the call. Compiles and checks them if need be."""
    query, (query_block, key_block) = call.query, call.block_sizes
    is_interpreted = query.device.type == "cpu" and _INTERPRETS
    if query.device.type != "cuda" and not is_interpreted:
        return f"tensors are on {query.device}, the kernels are for CUDA devices"
    if query.dtype not in (torch.float32 if is_interpreted else torch.bfloat16, torch.float16):
        return f"{query.dtype} is not one of bfloat16 and float16"
    if query.shape[3] not in HEAD_DIMS:
        return f"head_dim {query.shape[3]} is not a multiple of 8 from 16 to 128"
    if query_block not in BLOCK_SIZES or key_block not in BLOCK_SIZES:
        return f"blocks of {query_block} x {key_block} tokens, each of {BLOCK_SIZES} is needed"
    return (
        why_no_lists(call)
        or why_not_whole_blocks(call)
        or _why_no_kernels(query.device, query.dtype, query.shape[3], query_block, key_block)
    )


def why_no_lists(call: AttentionCall) -> str | None:
    """None, or why the lists of a call are too large for `lists_of_call`."""
    if call.layout is None:
        return None
    width, blocks = call.layout.key_blocks.shape[3], call.layout.num_query_blocks
    most = _MOST_ENTRIES // _groups(call.layout.query_block_size)
    if width > most or width * blocks >= 2**31:
        return f"the layout has lists of {width} entries, {most} are allowed"
    return None


def run_triton(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [batch, heads, length, head_dim] and log-sum-exp [batch, heads, length] of a call."""
    return run_operator(_in_graphs if fits_graphs(call) else triton_attention, call)


# torch.compile takes the answer as a constant.
@torch.compiler.assume_constant_result
def _why_no_kernels(
    device: torch.device, dtype: torch.dtype, head_dim: int, query_block: int, key_block: int
) -> str | None:
    return _check_kernels(device, dtype, head_dim, query_block, key_block)


@until_forgotten
def _check_kernels(
    device: torch.device, dtype: torch.dtype, head_dim: int, query_block: int, key_block: int
) -> str | None:
    """None if this device can run the kernels and gets a small problem right, else the reason."""
    if device.type == "cpu":
        return None
    return why_no_triton(device) or why_wrong(
        "triton", run_triton, device, dtype, head_dim, query_block, key_block
    )


def _groups(query_block: int) -> int:
    """Query blocks of a tile."""
    return max(1, _QUERY_TILE // query_block)


def _kernels(name: str) -> Any:
    """The module kernels/triton_<name>.py: Triton is imported at the first use only."""
    return importlib.import_module(f"adaptive_longformer.attention.kernels.triton_{name}")


@dataclass(frozen=True)
class CallLists:
    """The lists of a layout on their device, and what the kernels make of them.

    Attributes:
        lists: `Lists` of kernels/triton_lists.py.
        shape: of key_blocks.
        length: tokens.
        window: `Window`, or None.
        is_causal: whether entries in the future are left out.
        has_bias: whether entries have biases.
    """

    lists: Any
    shape: tuple[int, ...]
    length: int
    window: Any
    is_causal: bool
    has_bias: bool

    @property
    def blocks(self) -> tuple[int, int]:
        """Tokens of a query block and of a key block."""
        return self.lists.QUERY_BLOCK.value, self.lists.KEY_BLOCK.value

    @property
    def num_rows(self) -> int:
        return self.shape[0] * self.shape[1]

    @functools.cached_property
    def tiles(self) -> Any:
        """`TileLists`, with one launch."""
        module, (query_block, key_block) = _kernels("lists"), self.blocks
        groups, width = _groups(query_block), self.shape[3]
        num_tiles = _ceil(self.shape[2], groups)
        blocks_of_tile = max(1, 64 // key_block)
        room = _ceil(groups * width, blocks_of_tile) * blocks_of_tile
        make = functools.partial(torch.empty, dtype=torch.int32, device=self.lists.counts.device)
        tiles = module.TileLists(
            items=make(self.num_rows, num_tiles, room),
            entries=make(self.num_rows, num_tiles, room, groups) if self.has_bias else None,
            counts=make(self.num_rows, num_tiles, 2),
        )
        most = _power_of_two(max(room, 16))
        is_wide = 2 * _ceil(self.length, key_block) * most >= 2**31 - most
        _launch(
            module.make_tile_lists, self.num_rows * num_tiles, 4, self.lists, tiles, self.window,
            self.length, width, GROUPS=groups, CAUSAL=self.is_causal, WIDE=is_wide, P=most,
        )  # fmt: skip
        return tiles

    @property
    def unsplit(self) -> int:
        """So many readers of a key block `grad_keys` adds up; of small ones, none."""
        return self.part if self.blocks[1] >= 64 else 0

    @property
    def part(self) -> int:
        """Readers of a part of a column."""
        return _PART_TILES * _groups(self.blocks[0])

    @property
    def max_slots(self) -> int:
        """Parts of the columns of a row, at most."""
        num_entries = self.shape[2] * self.shape[3]
        if self.unsplit:
            return num_entries // self.part
        return min(num_entries, _ceil(self.length, self.blocks[1])) + num_entries // self.part

    @functools.cached_property
    def readers(self) -> Any:
        """`Readers`, with three launches."""
        module, key_block = _kernels("lists"), self.blocks[1]
        num_query_blocks, width = self.shape[2:]
        num_key_blocks, num_chunks = _ceil(self.length, key_block), _ceil(num_query_blocks, 32)
        make = functools.partial(torch.empty, dtype=torch.int32, device=self.lists.counts.device)
        readers = module.Readers(
            words=make(self.num_rows, num_chunks, num_key_blocks),
            offsets=make(self.num_rows, num_chunks, num_key_blocks),
            starts=make(self.num_rows, num_key_blocks + 1),
            entries=make(self.num_rows, num_query_blocks * width),
            slot_starts=make(self.num_rows, num_key_blocks + 1),
            slot_columns=make(self.num_rows, self.max_slots),
        )
        sizes, chunks = (self.length, width), self.num_rows * num_chunks
        _launch(module.mark_readers, chunks, 4, self.lists, readers, *sizes)
        _launch(
            module.number_readers, self.num_rows, 8, readers, num_query_blocks, num_key_blocks,
            self.max_slots, UNSPLIT=self.unsplit, PART=self.part,
            COLUMNS=min(_power_of_two(num_key_blocks), _COLUMNS),
        )  # fmt: skip
        _launch(module.write_readers, chunks, 4, self.lists, readers, *sizes)
        return readers


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _power_of_two(number: int) -> int:
    """The smallest one that is not below."""
    return 1 << (number - 1).bit_length()


def _launch(kernel: Any, programs: int, num_warps: int, *arguments: Any, **options: Any) -> None:
    """Launches a kernel on torch's current stream of the current device; nothing for no program.

    Raises:
        RuntimeError: Triton cannot compile it, or the device lacks what it needs.
    """
    if programs == 0:
        return
    try:
        kernel[(programs,)](*arguments, num_warps=num_warps, enable_fp_fusion=True, **options)
    except importlib.import_module("triton.errors").TritonError as error:
        raise RuntimeError(f"Triton kernel {kernel.fn.__name__}: {error}") from error


def _window(call: AttentionCall) -> Any:
    """`Window` of what is computed as a band, or None."""
    if call.layout is not None:
        window = call.layout.window
    else:
        assert call.pattern is not None
        window = split_window(call.pattern)[0]
    if window is None:
        return None
    assert window.right is not None
    return _kernels("tiles").Window(min(window.left, FAR), min(window.right, FAR))


def lists_of_call(call: AttentionCall) -> CallLists | None:
    """The lists of a call, made on the current device; None if the window is all. Those of a
    pattern are kept: they are the same in every layer and step.
    """
    if call.layout is not None:
        return _make_lists(call)
    assert call.pattern is not None
    if split_window(call.pattern)[1] is None:
        return None
    # What is made while a CUDA graph is captured belongs to the graph.
    if call.query.is_cuda and torch.cuda.is_current_stream_capturing():
        return _make_lists(call)
    heads, length = call.query.shape[1:3]
    return _pattern_lists(call.pattern, length, heads, call.query.device, call.is_causal)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _pattern_lists(
    pattern: Pattern, length: int, heads: int, device: torch.device, is_causal: bool
) -> CallLists | None:
    empty = torch.empty(1, heads, length, 1, device=device)
    lists = _make_lists(AttentionCall(empty, empty, empty, 1.0, pattern, is_causal=is_causal))
    assert lists is not None and lists.tiles is not None and lists.readers is not None
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # ready for every stream, once
    return lists


def _make_lists(call: AttentionCall) -> CallLists | None:
    layout = call.lists()
    if layout.key_blocks.numel() == 0:
        return None
    module, constant = _kernels("lists"), importlib.import_module("triton.language").constexpr
    lists = module.Lists(
        layout.key_blocks.int().contiguous(),
        layout.flags.expand(layout.key_blocks.shape).int().contiguous(),
        layout.counts.int().contiguous(),
        constant(layout.query_block_size),
        constant(layout.key_block_size),
    )
    shape, has_bias = tuple(layout.key_blocks.shape), call.entry_bias is not None
    return CallLists(lists, shape, layout.length, _window(call), call.is_causal, has_bias)


class _Problem:
    """A call as the kernels take it.

    Attributes:
        lists: its lists, or None.
        arguments: `Call` of kernels/triton_tiles.py.
        sizes: length, packed columns and width of the lists.
        num_tiles: tiles of queries.
        options: warps and stages of the attention kernels.
    """

    def __init__(self, call: AttentionCall) -> None:
        check_shapes(call)
        self.call, module = call, _kernels("tiles")
        constant = importlib.import_module("triton.language").constexpr
        self.lists = lists_of_call(call)
        batch, heads, length, head_dim = call.query.shape
        query_block, key_block = call.block_sizes
        groups = _groups(query_block)
        positions = None if call.global_keys is None else call.global_keys.packed()
        if positions is not None and positions.shape[1] == 0:
            positions = None
        span = dropout = bias = None
        if call.span is not None:
            length_of_span = call.span.length.detach().float().contiguous()
            span = module.Span(length_of_span, call.span.ramp)
        if call.dropout_p > 0:
            assert call.dropout_seed is not None
            factor = 1 / (1 - call.dropout_p)
            dropout = module.Dropout(call.dropout_seed, threshold(call.dropout_p), factor)
        if call.entry_bias is not None and self.lists is not None:
            bias = call.entry_bias.detach().float().contiguous()
        width = 0 if self.lists is None else self.lists.shape[3]
        num_packed = 0 if positions is None else positions.shape[1]
        self.sizes = (length, num_packed, width)
        self.num_tiles = _ceil(length, query_block * groups)
        self.num_programs = batch * heads * self.num_tiles
        self.arguments = module.Call(
            query=_rows(call.query),
            key=_rows(call.key),
            value=_rows(call.value),
            scale=float(call.scale),
            heads=heads,
            is_real=_bytes(call.attention_mask),
            is_global=_bytes(call.global_mask),
            positions=None if positions is None else positions.contiguous(),
            window=_window(call),
            span=span,
            dropout=dropout,
            lists=None if self.lists is None else _shared_rows(self.lists.shape),
            bias=bias,
            bias_rows=None if bias is None else _shared_rows(bias.shape),
            QUERY_BLOCK=constant(query_block),
            KEY_BLOCK=constant(key_block),
            GROUPS=constant(groups),
            HEAD_DIM=constant(head_dim),
            CAUSAL=constant(call.is_causal),
        )
        # Large tiles leave less shared memory for copies that are under way.
        num_large = int(max(query_block, key_block) > 64) + int(head_dim > 64)
        self.num_warps = 8 if num_large else 4
        self.num_stages = 3 - num_large

    def launch(self, kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
        """Launches one of the attention kernels, which take the call first."""
        options.update(num_stages=self.num_stages)
        _launch(kernel, programs, self.num_warps, self.arguments, *arguments, **options)


def _rows(tensor: torch.Tensor) -> Any:
    """`Rows` of a tensor [batch, heads, length, head_dim], copied where the kernels could not read
    it.
    """
    if tensor.stride(3) != 1 or tensor.shape[2] * tensor.stride(2) >= 2**31:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return _kernels("tiles").Rows(tensor, *tensor.stride()[:3])


def _bytes(mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def _shared_rows(shape: tuple[int, ...]) -> Any:
    """`ListRows` of lists [batch or 1, heads or 1, ...]."""
    batch_stride, head_stride = (shape[1] if shape[0] > 1 else 0), int(shape[1] > 1)
    return _kernels("tiles").ListRows(batch_stride, head_stride)


def forward(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp."""
    output = like_projection(call.query)
    lse = call.query.new_empty(call.query.shape[:3], dtype=torch.float32)
    if call.query.numel() == 0:
        return output, lse
    with torch.cuda.device_of(call.query):
        problem = _Problem(call)
        tiles = None if problem.lists is None else problem.lists.tiles
        kernel = _kernels("forward").attention_forward
        problem.launch(kernel, problem.num_programs, tiles, _rows(output), lse, *problem.sizes)
    return output, lse


def backward(
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    call: AttentionCall,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of query, key, value, entry_bias and span.length (None where that is None)."""
    query = call.query
    grads = [like_projection(tensor) for tensor in (query, call.key, call.value)]
    rows, make = query.shape[:2], functools.partial(query.new_empty, dtype=torch.float32)
    grad_bias = grad_span = None
    if call.entry_bias is not None:
        grad_bias = make(*rows, *call.entry_bias.shape[2:])
    if query.numel() == 0:
        if call.span is not None:
            grad_span = make(*rows, 0)
        return *grads, *gradients_of_biases(call, grad_bias, grad_span)
    with torch.cuda.device_of(query):
        problem, module = _Problem(call), _kernels("backward")
        lists, sizes = problem.lists, problem.sizes
        if grad_bias is not None and lists is None:
            grad_bias.zero_()
        if call.span is not None:
            grad_span = make(*rows, problem.num_tiles)
        upstream = module.Upstream(_rows(grad_output), make(query.shape[:3]), make(query.shape[:3]))
        problem.launch(
            module.grad_queries, problem.num_programs, None if lists is None else lists.tiles,
            upstream, (_rows(output), lse.contiguous(), grad_lse.contiguous()), _rows(grads[0]),
            None if problem.arguments.bias is None else grad_bias, grad_span, *sizes,
        )  # fmt: skip
        _key_gradients(problem, upstream, grads[1], grads[2])
    return *grads, *gradients_of_biases(call, grad_bias, grad_span)


def _key_gradients(
    problem: _Problem, upstream: Any, grad_key: torch.Tensor, grad_value: torch.Tensor
) -> None:
    """Writes the gradients of keys and values."""
    module, lists, sizes = _kernels("backward"), problem.lists, problem.sizes
    batch, heads, length, head_dim = grad_key.shape
    num_packs, num_parts = _ceil(sizes[1], 64), _ceil(_ceil(length, 64), 64)
    key_tile = max(64, problem.call.block_sizes[1])
    max_slots = 0 if lists is None else lists.max_slots
    make = functools.partial(grad_key.new_empty, dtype=torch.float32)
    parts, readers = module.Parts(None, None, None, None), None
    if lists is not None:
        readers = lists.readers
        shape = (batch, heads, max_slots, lists.blocks[1], head_dim)
        parts = parts._replace(list_keys=make(shape), list_values=make(shape))
        problem.launch(
            module.grad_list_parts, batch * heads * max_slots, readers, upstream, parts, *sizes,
            max_slots, UNSPLIT=lists.unsplit, PART=lists.part,
        )  # fmt: skip
    if num_packs > 0:
        shape = (batch, heads, num_packs * num_parts, 64, head_dim)
        parts = parts._replace(packed_keys=make(shape), packed_values=make(shape))
        problem.launch(
            module.grad_packed_parts, batch * heads * num_packs * num_parts, upstream, parts, *sizes
        )
    problem.launch(
        module.grad_keys, batch * heads * (_ceil(length, key_tile) + num_packs), readers, upstream,
        parts, _rows(grad_key), _rows(grad_value), *sizes, max_slots,
        UNSPLIT=0 if lists is None else lists.unsplit,
    )  # fmt: skip


triton_attention = define_operator("triton_attention", forward, backward)
_in_graphs = define_operator("triton_attention_in_graphs", forward, backward, ())
