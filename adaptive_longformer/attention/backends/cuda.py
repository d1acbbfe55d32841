"""Calls the CUDA kernels of csrc/cuda: brings the lists into their form, on the device and without
waiting for it, and fills their argument struct.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from adaptive_longformer.attention.backends.triton import lists_of_call
from adaptive_longformer.attention.call import AttentionCall
from adaptive_longformer.attention.kernels.cuda_launches import (
    ELEMENT_TYPES,
    KEY_BLOCK_SIZE,
    PIECE,
    Launch,
    backward_launches,
    forward_launches,
)
from adaptive_longformer.attention.kernels.kernel_call import (
    KernelArguments,
    RowTensor,
    fields,
    gradients_of_biases,
)
from adaptive_longformer.attention.kernels.load import kernel_library
from adaptive_longformer.attention.memory_format import like_projection
from adaptive_longformer.attention.padding import ordinary_tokens
from adaptive_longformer.patterns.block_layout import BlockLayout, EntryFlag, block_layout
from adaptive_longformer.patterns.cached_tensors import ready_for_every_stream
from adaptive_longformer.patterns.pattern import Pattern

# A column of the transposed lists with more entries than this is split into items of so many, whose
# sums are added in a fixed order: a block that everyone reads would keep one processor busy alone.
_ITEM_ENTRIES = 64


@dataclass(frozen=True)
class GradientItems:
    """The work of the gradients of keys and values: columns of transposed lists, long ones split.

    All sizes follow from those of the lists, so that nothing is read back from the device.

    Attributes:
        query_blocks, entries: of every entry, sorted by column (list row * num_blocks + key block).
        column: of every item, or -1 for an item that is not used.
        first, last: which entries an item adds up.
        slot: where an item's sums go, or -1 if the item is its whole column.
        column_first_slot, column_slots: of every column; 0 slots if it was not split.
        num_slots: an upper bound.
    """

    query_blocks: torch.Tensor
    entries: torch.Tensor
    column: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor
    slot: torch.Tensor
    column_first_slot: torch.Tensor
    column_slots: torch.Tensor
    num_slots: int


def gradient_items(layout: BlockLayout, item_entries: int = _ITEM_ENTRIES) -> GradientItems:
    """Splits the columns of a layout's transposed lists into items, ordered as `_Lists.order`."""
    transposed = layout.transpose()
    starts = transposed.starts.long()
    lengths = starts[1:] - starts[:-1]  # [columns]
    pieces = -(-lengths // item_entries)
    is_split = pieces > 1
    num_entries, num_columns = transposed.entries.numel(), lengths.numel()
    pieces = pieces.clamp(min=1)
    ends = pieces.cumsum(0)
    item = torch.arange(num_columns + num_entries // item_entries, device=starts.device)
    column = torch.searchsorted(ends, item, right=True)
    is_used = column < num_columns
    column = column.clamp(max=num_columns - 1)
    first = starts[column] + (item - (ends - pieces)[column]) * item_entries
    last = torch.minimum(first + item_entries, starts[column + 1])
    column_slots = pieces.where(is_split, 0)
    in_slot = is_used & is_split[column]
    slot = (in_slot.cumsum(0) - 1).where(in_slot, -1)
    # By list row, and in each the longest first.
    row = (column // layout.num_key_blocks).where(is_used, num_columns)
    order = torch.argsort(row * (item_entries + 1) - (last - first), stable=True)
    return GradientItems(
        query_blocks=transposed.query_blocks,
        entries=transposed.entries.int(),
        column=column.where(is_used, -1)[order].int(),
        first=first[order].int(),
        last=last[order].int(),
        slot=slot[order].int(),
        column_first_slot=(column_slots.cumsum(0) - column_slots).int(),
        column_slots=column_slots.int(),
        # A split column has more than item_entries entries, so at most two items for so many.
        num_slots=2 * num_entries // item_entries,
    )


@dataclass(frozen=True)
class _Lists:
    """The lists of a call as the kernels read them.

    Attributes:
        layout: with the blocks of packed global keys at the head of every list.
        num_packs: how many these are.
        order: int32, all lists: head by head, so that the second-level cache holds the keys that
            are read; the longest of a head first, so that none is begun at the end.
        known_items: what `items` gives, if it is known already.
    """

    layout: BlockLayout
    num_packs: int
    order: torch.Tensor
    known_items: GradientItems | None = None

    def items(self) -> GradientItems:
        """The work of the gradients of keys and values."""
        if self.known_items is not None:
            return self.known_items
        # The packed blocks lie behind the sequence, as if it were longer.
        num_blocks = self.layout.num_key_blocks + self.num_packs
        return gradient_items(replace(self.layout, length=num_blocks * KEY_BLOCK_SIZE))


def _packed_lists(layout: BlockLayout, num_packs: int) -> _Lists:
    layout = replace(
        layout,
        key_blocks=layout.key_blocks.int(),
        counts=layout.counts.int(),
        flags=layout.flags.expand(layout.key_blocks.shape).int(),
    )
    if num_packs > 0:
        ids = layout.num_key_blocks + torch.arange(num_packs, device=layout.counts.device)
        packs = ids.int().expand(*layout.counts.shape, num_packs)
        flags = torch.full_like(packs, int(EntryFlag.GLOBAL_PACK))
        layout = replace(
            layout,
            key_blocks=torch.cat([packs, layout.key_blocks], dim=-1),
            flags=torch.cat([flags, layout.flags], dim=-1),
            counts=layout.counts + num_packs,
        )
    order = torch.argsort(layout.counts, dim=-1, descending=True, stable=True)
    batch, heads, rows = order.shape
    order += rows * torch.arange(batch * heads, device=order.device).view(batch, heads, 1)
    return _Lists(layout, num_packs, order.flatten().int())


def _strides_of_lists(shape: Sequence[int], rows: int) -> tuple[int, int]:
    """Of [batch or 1, heads or 1, ...]: strides by batch row and by head, 0 where shared."""
    return shape[1] * rows * (shape[0] > 1), rows * (shape[1] > 1)


def _lists_of(call: AttentionCall, num_packs: int) -> _Lists:
    """The lists of a call. Those of a pattern are kept: they are the same in every layer and step,
    and making them anew can take longer than the attention.
    """
    query, pattern = call.query, call.pattern
    # What is made while a CUDA graph is captured belongs to the graph.
    is_capturing = query.is_cuda and torch.cuda.is_current_stream_capturing()
    if pattern is None or is_capturing:
        return _packed_lists(call.lists(), num_packs)
    heads, length = query.shape[1:3]
    return _pattern_lists(pattern, length, heads, query.device, num_packs)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _pattern_lists(
    pattern: Pattern, length: int, heads: int, device: torch.device, num_packs: int
) -> _Lists:
    layout = block_layout(pattern, length, num_heads=heads, device=device)
    lists = _packed_lists(layout, num_packs)
    # Waiting once for the number of slots saves the room for as many as there could be.
    items = lists.items()
    items = replace(items, num_slots=int(items.column_slots.sum()))
    return ready_for_every_stream(replace(lists, known_items=items), device)


def forward(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp."""
    arguments = CudaArguments(call)
    output = like_projection(call.query)
    lse = call.query.new_empty(call.query.shape[:3], dtype=torch.float32)
    arguments.set_rows(output=output)
    arguments.set_arrays(lse=lse)
    arguments.run(forward_launches(arguments))
    return output, lse


def backward(
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    call: AttentionCall,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of query, key, value, entry_bias and span.length (None where that is None)."""
    arguments, query = CudaArguments(call), call.query
    # Only keys that some list may show are written.
    grads = (
        like_projection(query),
        like_projection(call.key, zero=True),
        like_projection(call.value, zero=True),
    )
    arguments.set_rows(
        output=output, grad_output=grad_output,
        grad_query=grads[0], grad_key=grads[1], grad_value=grads[2],
    )  # fmt: skip
    arguments.set_arrays(lse=lse, grad_lse=grad_lse)
    arguments.set_gradient_items()
    rows = (*query.shape[:2], arguments.num_query_blocks)
    grad_bias = grad_span = None
    if call.entry_bias is not None:
        shape = arguments.shape_of_bias_gradients(call.entry_bias)
        grad_bias = query.new_zeros((*query.shape[:2], *shape), dtype=torch.float32)
        arguments.set_arrays(grad_entry_bias=grad_bias)
    if call.span is not None:
        grad_span = query.new_empty(rows, dtype=torch.float32)
        arguments.set_arrays(grad_span=grad_span)
    arguments.run(backward_launches(arguments))
    if grad_bias is not None:
        grad_bias = arguments.bias_gradients(grad_bias)
    return *grads, *gradients_of_biases(call, grad_bias, grad_span)


class CudaArguments(KernelArguments):
    """`Arguments` of csrc/cuda/arguments.cuh, field by field."""

    _fields_ = [
        *fields(ctypes.c_int, "element_type head_dim query_block_size batch heads length"),
        *fields(ctypes.c_int, "num_query_blocks max_entries num_sequence_blocks num_blocks"),
        *fields(ctypes.c_int, "list_batches list_heads is_causal has_window left right"),
        *fields(ctypes.c_int, "has_dropout dropout_threshold"),
        *fields(ctypes.c_float, "scale keep_factor span_ramp"),
        *fields(ctypes.c_int, "num_items num_slots"),
        *fields(ctypes.c_int, "small_query_block small_key_block small_width small_tiles"),
        *fields(ctypes.c_int, "small_room small_slots slot_readers packed_parts"),
        *fields(ctypes.c_int, "small_batch_stride small_head_stride"),
        *fields(RowTensor, "query key value"),
        *fields(ctypes.c_void_p, "key_blocks counts flags order"),
        *fields(ctypes.c_void_p, "small_items small_entries small_counts entry_bias"),
        *fields(ctypes.c_longlong, "bias_batch_stride bias_head_stride"),
        *fields(ctypes.c_void_p, "open_keys global_positions is_padding row_words column_words"),
        *fields(ctypes.c_void_p, "span_length"),
        *fields(RowTensor, "output"),
        *fields(ctypes.c_void_p, "lse"),
        *fields(RowTensor, "grad_output"),
        *fields(ctypes.c_void_p, "grad_lse row_lse row_delta row_used"),
        *fields(RowTensor, "grad_query grad_key grad_value"),
        *fields(ctypes.c_void_p, "grad_entry_bias grad_span"),
        *fields(ctypes.c_void_p, "transposed_query_blocks transposed_entries"),
        *fields(ctypes.c_void_p, "item_column item_first item_last item_slot"),
        *fields(ctypes.c_void_p, "column_first_slot column_slots partial_keys partial_values"),
        *fields(ctypes.c_void_p, "reader_starts reader_entries slot_starts slot_columns"),
        *fields(ctypes.c_void_p, "small_keys small_values"),
    ]

    def __init__(self, call: AttentionCall) -> None:
        super().__init__(call)
        self.element_type = ELEMENT_TYPES[call.query.dtype]
        self.set_rows(query=call.query, key=call.key, value=call.value)
        self.is_small = call.block_sizes[1] < KEY_BLOCK_SIZE
        self._set_keys()
        self._set_small_lists() if self.is_small else self._set_lists()
        if call.entry_bias is not None:
            bias = call.entry_bias.float()
            if not self.is_small:
                bias = torch.nn.functional.pad(bias, (self.num_packs, 0))
            self.set_arrays(entry_bias=bias)
            strides = _strides_of_lists(bias.shape, bias.shape[2])
            self.bias_batch_stride, self.bias_head_stride = strides
        if call.span is not None:
            self.set_arrays(span_length=call.span.length.detach().float())
            self.span_ramp = call.span.ramp
        if call.attention_mask is not None:
            self.set_arrays(is_padding=~call.attention_mask)
        self.keep_factor = 1 / (1 - call.dropout_p)
        if call.dropout_p > 0:
            self.has_dropout = 1
            self.set_dropout_words()

    def _set_small_lists(self) -> None:
        """The lists of blocks smaller than a tile, put together for tiles of queries."""
        call = self.call
        self.small_query_block, self.small_key_block = call.block_sizes
        self.query_block_size = KEY_BLOCK_SIZE
        self.num_query_blocks, self.list_batches, self.list_heads = self.num_sequence_blocks, 1, 1
        assert call.layout is not None
        self.set_window(call.layout.window)
        with torch.cuda.device_of(call.query):
            self.small_lists = lists_of_call(call)
            if self.small_lists is None:
                return
            tiles, shape = self.small_lists.tiles, self.small_lists.shape
        self.small_width = shape[3]
        self.small_tiles, self.small_room = tiles.items.shape[1:]
        self.small_batch_stride, self.small_head_stride = _strides_of_lists(shape, 1)
        self.set_arrays(small_items=tiles.items, small_counts=tiles.counts)
        if tiles.entries is not None:
            self.set_arrays(small_entries=tiles.entries)

    def _set_lists(self) -> None:
        """The lists of blocks as large as a tile."""
        self.lists = _lists_of(self.call, self.num_packs)
        layout = self.lists.layout
        self.set_window(layout.window)
        self.list_batches, self.list_heads = layout.key_blocks.shape[:2]
        self.num_query_blocks, self.max_entries = layout.key_blocks.shape[2:]
        self.set_arrays(
            key_blocks=layout.key_blocks,
            counts=layout.counts,
            flags=layout.flags,
            order=self.lists.order,
        )

    def _set_keys(self) -> None:
        """Packs the global keys, and marks the open keys."""
        call, device = self.call, self.call.query.device
        batch, _, length, _ = call.query.shape
        num_sequence_blocks = -(-length // KEY_BLOCK_SIZE)
        padded = num_sequence_blocks * KEY_BLOCK_SIZE
        is_open = torch.arange(padded, device=device).expand(batch, -1) < length
        listed = ordinary_tokens(call.attention_mask, call.global_mask)
        if listed is not None:
            is_open = is_open & torch.nn.functional.pad(listed, (0, padded - length))
        self.num_packs = 0
        if call.global_keys is not None:
            positions = call.global_keys.packed()
            self.num_packs = -(-positions.shape[1] // KEY_BLOCK_SIZE)
            missing = self.num_packs * KEY_BLOCK_SIZE - positions.shape[1]
            positions = torch.nn.functional.pad(positions, (0, missing), value=length)
            is_open = torch.cat([is_open, positions < length], dim=1)
            self.set_arrays(global_positions=positions.int())
        num_blocks = num_sequence_blocks + self.num_packs
        self.num_sequence_blocks, self.num_blocks = num_sequence_blocks, num_blocks
        bits = is_open.view(-1, num_blocks, KEY_BLOCK_SIZE).long()
        bits = (bits << torch.arange(KEY_BLOCK_SIZE, device=device)).sum(dim=-1)
        self.set_arrays(open_keys=bits)

    def shape_of_bias_gradients(self, bias: torch.Tensor) -> tuple[int, ...]:
        """Of a batch row and head, as the kernels write them."""
        blocks, width = bias.shape[2:]
        if not self.is_small:
            return blocks, self.max_entries
        query_block, key_block = self.call.block_sizes
        return blocks * query_block // PIECE, width, key_block // PIECE

    def bias_gradients(self, written: torch.Tensor) -> torch.Tensor:
        """[batch, heads, query blocks, entries] from what the kernels wrote."""
        if not self.is_small:
            return written[..., self.num_packs :]
        return written.unflatten(2, (-1, self.call.block_sizes[0] // PIECE)).sum(dim=(3, 5))

    def set_gradient_items(self) -> None:
        """The transposed lists, and room for what the backward pass keeps between its kernels."""
        query = self.call.query
        if self.is_small:
            self._set_small_items()
        else:
            self._set_items()
        parts = (
            query.shape[0]
            // max(self.list_batches, 1)
            * (query.shape[1] // max(self.list_heads, 1)),
            self.num_slots * KEY_BLOCK_SIZE * query.shape[3],
        )
        rows = (*query.shape[:2], self.num_query_blocks * self.query_block_size)
        self.set_arrays(
            partial_keys=query.new_empty(parts, dtype=torch.float32),
            partial_values=query.new_empty(parts, dtype=torch.float32),
            row_lse=query.new_empty(rows, dtype=torch.float32),
            row_delta=query.new_empty(rows, dtype=torch.float32),
            row_used=query.new_empty((*rows[:2], rows[2] // 64), dtype=torch.int64),
        )

    def _set_items(self) -> None:
        items = self.lists.items()
        self.num_items, self.num_slots = items.column.numel(), items.num_slots
        self.set_arrays(
            transposed_query_blocks=items.query_blocks,
            transposed_entries=items.entries,
            item_column=items.column,
            item_first=items.first,
            item_last=items.last,
            item_slot=items.slot,
            column_first_slot=items.column_first_slot,
            column_slots=items.column_slots,
        )

    def _set_small_items(self) -> None:
        query, lists = self.call.query, self.small_lists
        self.packed_parts = max(1, -(-self.num_query_blocks // _ITEM_ENTRIES))
        packed = self.num_packs * self.packed_parts
        self.num_items = self.num_sequence_blocks + packed
        self.num_slots = packed if self.packed_parts > 1 else 0
        if lists is None:
            return
        with torch.cuda.device_of(query):
            readers = lists.readers
        self.small_slots, self.slot_readers = lists.max_slots, lists.part
        shape = (*query.shape[:2], lists.max_slots, self.small_key_block, query.shape[3])
        self.set_arrays(
            reader_starts=readers.starts,
            reader_entries=readers.entries,
            slot_starts=readers.slot_starts,
            slot_columns=readers.slot_columns,
            small_keys=query.new_empty(shape, dtype=torch.float32),
            small_values=query.new_empty(shape, dtype=torch.float32),
        )

    def set_rows(self, **tensors: torch.Tensor) -> None:
        """Points fields at tensors [batch, heads, length, head_dim], copied where the kernels'
        accesses of 16 bytes would be misaligned, or the stride of a row too large for them.
        """
        for name, tensor in tensors.items():
            is_aligned = tensor.data_ptr() % 16 == 0 and tensor.stride(-1) == 1
            is_aligned &= all(stride % 8 == 0 for stride in tensor.stride()[:3])
            if not is_aligned or tensor.stride(2) >= 2**31 // KEY_BLOCK_SIZE:
                tensor = tensor.clone(memory_format=torch.contiguous_format)
            self.point_to_rows(name, tensor)

    def run(self, launches: list[Launch]) -> None:
        """Launches kernels one after the other on torch's current stream.

        Raises:
            RuntimeError: with the kernel and what CUDA says.
        """
        query = self.call.query
        if query.numel() == 0:
            return
        library, stream = kernel_library("cuda"), 0
        assert library.adaptive_cuda_arguments_size() == ctypes.sizeof(self)
        if query.is_cuda:
            stream = torch.cuda.current_stream(query.device).cuda_stream
        with torch.cuda.device_of(query):
            for launch in launches:
                error = library.adaptive_cuda_launch(
                    ctypes.byref(launch), ctypes.byref(self), ctypes.c_void_p(stream)
                )
                if error != 0:
                    explain = library.adaptive_cuda_error
                    explain.restype = ctypes.c_char_p
                    raise RuntimeError(
                        f"the CUDA kernel {launch.name} failed: {explain(error).decode()}"
                    )
