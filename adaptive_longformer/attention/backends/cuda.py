"""Calls the CUDA kernels of csrc/cuda: brings the lists into their form, on the device and without
waiting for it, and fills their argument struct.
"""

import ctypes
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from adaptive_longformer.attention.global_rows import pack_global_tokens
from adaptive_longformer.attention.kernels.cuda_launches import (
    ELEMENT_TYPES,
    KEY_BLOCK_SIZE,
    Launch,
    backward_launches,
    forward_launches,
)
from adaptive_longformer.attention.kernels.kernel_call import KernelCall, RowTensor, fields
from adaptive_longformer.attention.kernels.load import kernel_library
from adaptive_longformer.attention.memory_format import like_projection
from adaptive_longformer.attention.operator import OperatorArguments
from adaptive_longformer.patterns.block_layout import BlockLayout, EntryFlag, block_layout
from adaptive_longformer.patterns.pattern import pattern_from_spec

# A column of the transposed lists with more entries than this is split into items of so many, whose
# sums are added in a fixed order: a block that everyone reads would keep one processor busy alone.
_ITEM_ENTRIES = 64


class _Arguments(ctypes.Structure):
    """`Arguments` of csrc/cuda/arguments.cuh, field by field."""

    _fields_ = [
        *fields(ctypes.c_int, "element_type head_dim query_block_size batch heads length"),
        *fields(ctypes.c_int, "num_query_blocks max_entries num_sequence_blocks num_blocks"),
        *fields(ctypes.c_int, "list_batches list_heads is_causal has_window left right"),
        *fields(ctypes.c_int, "has_dropout dropout_threshold"),
        *fields(ctypes.c_float, "scale keep_factor span_ramp"),
        *fields(ctypes.c_int, "num_items num_slots"),
        *fields(RowTensor, "query key value"),
        *fields(ctypes.c_void_p, "key_blocks counts flags order entry_bias"),
        *fields(ctypes.c_longlong, "bias_batch_stride bias_head_stride"),
        *fields(ctypes.c_void_p, "open_keys global_positions is_padding row_words column_words"),
        *fields(ctypes.c_void_p, "span_length"),
        *fields(RowTensor, "output"),
        *fields(ctypes.c_void_p, "lse"),
        *fields(RowTensor, "grad_output"),
        *fields(ctypes.c_void_p, "grad_lse row_lse row_delta"),
        *fields(RowTensor, "grad_query grad_key grad_value"),
        *fields(ctypes.c_void_p, "grad_entry_bias grad_span"),
        *fields(ctypes.c_void_p, "transposed_query_blocks transposed_entries"),
        *fields(ctypes.c_void_p, "item_column item_first item_last item_slot"),
        *fields(ctypes.c_void_p, "column_first_slot column_slots partial_keys partial_values"),
    ]


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
    """Splits the columns of a layout's transposed lists into items, the longest first."""
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
    order = torch.argsort((last - first).where(is_used, -1), descending=True, stable=True)
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
        order: int32, all lists, the longest first.
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
    order = torch.argsort(layout.counts.flatten(), descending=True, stable=True)
    return _Lists(layout, num_packs, order.int())


def _lists_of(inputs: OperatorArguments, num_packs: int) -> _Lists:
    """The lists of a call. Those of a pattern are kept: they are the same in every layer and step,
    and making them anew can take longer than the attention.
    """
    query = inputs.query
    # What is made while a CUDA graph is captured belongs to the graph.
    is_capturing = query.is_cuda and torch.cuda.is_current_stream_capturing()
    if inputs.key_blocks is not None or is_capturing:
        return _packed_lists(inputs.layout(), num_packs)
    return _pattern_lists(
        inputs.pattern, query.shape[2], inputs.query_block_size, query.shape[1], query.device,
        num_packs,
    )  # fmt: skip


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _pattern_lists(
    pattern: str,
    length: int,
    query_block_size: int,
    heads: int,
    device: torch.device,
    num_packs: int,
) -> _Lists:
    layout = block_layout(
        pattern_from_spec(pattern),
        length,
        query_block_size=query_block_size,
        key_block_size=KEY_BLOCK_SIZE,
        num_heads=heads,
        device=device,
    )
    lists = _packed_lists(layout, num_packs)
    # Waiting once for the number of slots saves the room for as many as there could be, and makes
    # the lists ready for every stream.
    items = lists.items()
    items = replace(items, num_slots=int(items.column_slots.sum()))
    return replace(lists, known_items=items)


def forward(arguments: OperatorArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp."""
    call, query = _Call(arguments), arguments.query
    output = like_projection(query)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    call.set_rows(output=output)
    call.set_arrays(lse=lse)
    call.run(forward_launches(call.arguments))
    return output, lse


def backward(
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    arguments: OperatorArguments,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key, value, entry_bias and span_length (empty where that is None)."""
    call = _Call(arguments)
    query, key, value = arguments.query, arguments.key, arguments.value
    # Only keys that some list may show are written.
    grads = (
        like_projection(query),
        like_projection(key, zero=True),
        like_projection(value, zero=True),
    )
    call.set_rows(output=output, grad_output=grad_output)
    call.set_rows(grad_query=grads[0], grad_key=grads[1], grad_value=grads[2])
    call.set_arrays(lse=lse, grad_lse=grad_lse)
    call.set_gradient_items()
    lists = (*query.shape[:2], call.layout.num_query_blocks)
    grad_bias = grad_span = None
    if call.entry_bias is not None:
        grad_bias = query.new_zeros((*lists, call.layout.key_blocks.shape[3]), dtype=torch.float32)
        call.set_arrays(grad_entry_bias=grad_bias)
    if call.span_length is not None:
        grad_span = query.new_empty(lists, dtype=torch.float32)
        call.set_arrays(grad_span=grad_span)
    call.run(backward_launches(call.arguments))
    return *grads, call.reduce_entry_bias(grad_bias), call.reduce_span(grad_span)


class _Call(KernelCall):
    def __init__(self, inputs: OperatorArguments) -> None:
        arguments, query = _Arguments(), inputs.query
        super().__init__(inputs, arguments)
        arguments.batch, arguments.heads, arguments.length, arguments.head_dim = query.shape
        arguments.element_type = ELEMENT_TYPES[query.dtype]
        arguments.query_block_size = inputs.query_block_size
        arguments.is_causal, arguments.scale = inputs.is_causal, inputs.scale
        self.set_rows(query=query, key=inputs.key, value=inputs.value)

        self._set_lists(inputs)
        if self.entry_bias is not None:
            padded = torch.nn.functional.pad(self.entry_bias.float(), (self.num_packs, 0))
            self.set_arrays(entry_bias=padded)
            rows = padded.shape[2]
            arguments.bias_batch_stride = padded.shape[1] * rows if padded.shape[0] > 1 else 0
            arguments.bias_head_stride = rows if padded.shape[1] > 1 else 0
        if self.span_length is not None:
            self.set_arrays(span_length=self.span_length.detach().float())
            arguments.span_ramp = inputs.span_ramp
        if inputs.attention_mask is not None:
            self.set_arrays(is_padding=~inputs.attention_mask)
        arguments.keep_factor = 1 / (1 - inputs.dropout_p)
        if inputs.dropout_p > 0:
            arguments.has_dropout = 1
            self.set_dropout_words(inputs)

    def _set_lists(self, inputs: OperatorArguments) -> None:
        """Packs the global keys, marks the open keys, and sets the lists."""
        arguments, query, length = self.arguments, self.query, self.query.shape[2]
        num_sequence_blocks = -(-length // KEY_BLOCK_SIZE)
        padded = num_sequence_blocks * KEY_BLOCK_SIZE
        is_open = torch.arange(padded, device=query.device).expand(query.shape[0], -1) < length
        listed, global_mask = inputs.attention_mask, inputs.global_mask
        if global_mask is not None:
            listed = ~global_mask if listed is None else listed & ~global_mask
        if listed is not None:
            is_open = is_open & torch.nn.functional.pad(listed, (0, padded - length))
        self.num_packs = 0
        if global_mask is not None:
            positions = pack_global_tokens(global_mask, inputs.max_global_tokens)
            self.num_packs = -(-positions.shape[1] // KEY_BLOCK_SIZE)
            missing = self.num_packs * KEY_BLOCK_SIZE - positions.shape[1]
            positions = torch.nn.functional.pad(positions, (0, missing), value=length)
            is_open = torch.cat([is_open, positions < length], dim=1)
            self.set_arrays(global_positions=positions.int())
        num_blocks = num_sequence_blocks + self.num_packs
        arguments.num_sequence_blocks, arguments.num_blocks = num_sequence_blocks, num_blocks
        self.lists = _lists_of(inputs, self.num_packs)
        self.layout = layout = self.lists.layout
        self.set_window(layout.window)
        arguments.list_batches, arguments.list_heads = layout.key_blocks.shape[:2]
        arguments.num_query_blocks, arguments.max_entries = layout.key_blocks.shape[2:]
        bits = is_open.view(-1, num_blocks, KEY_BLOCK_SIZE).long()
        bits = (bits << torch.arange(KEY_BLOCK_SIZE, device=query.device)).sum(dim=-1)
        self.set_arrays(
            key_blocks=layout.key_blocks,
            counts=layout.counts,
            flags=layout.flags,
            open_keys=bits,
            order=self.lists.order,
        )

    def set_gradient_items(self) -> None:
        """The transposed lists, and room for what the backward pass keeps between its kernels."""
        arguments, query = self.arguments, self.query
        items = self.lists.items()
        arguments.num_items, arguments.num_slots = items.column.numel(), items.num_slots
        list_batches, list_heads = self.layout.key_blocks.shape[:2]
        parts = (
            query.shape[0] // max(list_batches, 1) * (query.shape[1] // max(list_heads, 1)),
            items.num_slots * KEY_BLOCK_SIZE * query.shape[3],
        )
        rows = (*query.shape[:2], self.layout.num_query_blocks * self.layout.query_block_size)
        self.set_arrays(
            transposed_query_blocks=items.query_blocks,
            transposed_entries=items.entries,
            item_column=items.column,
            item_first=items.first,
            item_last=items.last,
            item_slot=items.slot,
            column_first_slot=items.column_first_slot,
            column_slots=items.column_slots,
            partial_keys=query.new_empty(parts, dtype=torch.float32),
            partial_values=query.new_empty(parts, dtype=torch.float32),
            row_lse=query.new_empty(rows, dtype=torch.float32),
            row_delta=query.new_empty(rows, dtype=torch.float32),
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
            setattr(self.arguments, name, self.row_tensor(tensor))

    def run(self, launches: list[Launch]) -> None:
        """Launches kernels one after the other on torch's current stream."""
        if self.query.numel() == 0:
            return
        kernels, device, stream = kernel_library("cuda"), 0, 0
        if self.query.is_cuda:
            device = self.query.device.index
            stream = torch.cuda.current_stream(self.query.device).cuda_stream
        with torch.cuda.device_of(self.query):
            for launch in launches:
                kernels.launch(launch, self.arguments, device, stream)

    def reduce_entry_bias(self, grad: torch.Tensor | None) -> torch.Tensor:
        return super().reduce_entry_bias(None if grad is None else grad[..., self.num_packs :])
