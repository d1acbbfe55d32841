"""Calls the C++ kernels of csrc/cpu: fills their argument struct from tensors, nothing else."""

import ctypes

import torch

from adaptive_longformer.attention.call import AttentionCall
from adaptive_longformer.attention.kernels.kernel_call import (
    KernelArguments,
    RowTensor,
    fields,
    gradients_of_biases,
)
from adaptive_longformer.attention.kernels.load import kernel_library
from adaptive_longformer.attention.memory_format import like_projection
from adaptive_longformer.attention.padding import ordinary_tokens
from adaptive_longformer.attention.reference import MIN_WEIGHT

ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ERRORS = {
    1: "the compiled attention kernel ran out of memory",
    2: "the layout has counts or key blocks out of range, BlockLayout.validate() tells which",
}


def forward(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp."""
    arguments = CpuArguments(call)
    output = like_projection(call.query)
    lse = call.query.new_empty(call.query.shape[:3], dtype=torch.float32)
    arguments.set_rows(output=output)
    arguments.set_arrays(lse=lse)
    arguments.run("adaptive_attention_forward")
    return output, lse


def backward(
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    call: AttentionCall,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of query, key, value, entry_bias and span.length (None where that is None)."""
    arguments = CpuArguments(call)
    grads = [like_projection(tensor) for tensor in (call.query, call.key, call.value)]
    arguments.set_rows(
        output=output, grad_output=grad_output,
        grad_query=grads[0], grad_key=grads[1], grad_value=grads[2],
    )  # fmt: skip
    arguments.set_arrays(lse=lse, grad_lse=grad_lse)
    rows = (*call.query.shape[:2], arguments.num_query_blocks)
    grad_bias = grad_span = None
    if call.entry_bias is not None:
        grad_bias = torch.zeros((*rows, arguments.max_entries), dtype=torch.float32)
        arguments.set_arrays(grad_entry_bias=grad_bias)
    if call.span is not None:
        grad_span = torch.empty(rows, dtype=torch.float32)
        arguments.set_arrays(grad_span=grad_span)
    arguments.run("adaptive_attention_backward")
    return *grads, *gradients_of_biases(call, grad_bias, grad_span)


class CpuArguments(KernelArguments):
    """`Arguments` of csrc/cpu/arguments.h, field by field."""

    _fields_ = [
        *fields(ctypes.c_int64, "batch heads length head_dim element_type"),
        *fields(ctypes.c_int64, "query_block_size key_block_size is_causal has_window left right"),
        *fields(ctypes.c_double, "scale dropout_p"),
        *fields(ctypes.c_int64, "dropout_threshold num_threads"),
        *fields(RowTensor, "query key value"),
        *fields(ctypes.c_void_p, "key_blocks counts flags"),
        *fields(ctypes.c_int64, "list_batch_stride list_head_stride num_query_blocks max_entries"),
        *fields(ctypes.c_void_p, "entry_bias"),
        *fields(ctypes.c_int64, "bias_batch_stride bias_head_stride"),
        *fields(ctypes.c_void_p, "is_listed is_padding global_positions"),
        *fields(ctypes.c_int64, "num_global"),
        *fields(ctypes.c_void_p, "row_words column_words"),
        *fields(ctypes.c_void_p, "span_length span_log_weight span_slope"),
        *fields(ctypes.c_int64, "span_columns span_center"),
        *fields(RowTensor, "output"),
        *fields(ctypes.c_void_p, "lse"),
        *fields(RowTensor, "grad_output"),
        *fields(ctypes.c_void_p, "grad_lse"),
        *fields(RowTensor, "grad_query grad_key grad_value"),
        *fields(ctypes.c_void_p, "grad_entry_bias grad_span"),
    ]

    def __init__(self, call: AttentionCall) -> None:
        super().__init__(call)
        layout = call.lists()
        self.element_type = ELEMENT_TYPES[call.query.dtype]
        self.num_threads = torch.get_num_threads()
        self.key_block_size = layout.key_block_size
        self.set_rows(query=call.query, key=call.key, value=call.value)
        key_blocks = layout.key_blocks.int()
        self.set_arrays(
            key_blocks=key_blocks,
            counts=layout.counts.int(),
            flags=layout.flags.expand(key_blocks.shape).int(),
        )
        self.num_query_blocks, self.max_entries = key_blocks.shape[2:]
        self.list_batch_stride, self.list_head_stride = _broadcast_strides(key_blocks)
        self.set_window(layout.window)
        if call.entry_bias is not None:
            self.set_arrays(entry_bias=call.entry_bias.float())
            self.bias_batch_stride, self.bias_head_stride = _broadcast_strides(call.entry_bias)
        if call.span is not None:
            self._set_span(call.span.length.detach().float(), call.span.ramp)
        if call.attention_mask is not None:
            self.set_arrays(is_padding=~call.attention_mask)
        if call.global_keys is not None:
            positions = call.global_keys.packed()
            self.num_global = positions.shape[1]
            self.set_arrays(global_positions=positions)
        is_listed = ordinary_tokens(call.attention_mask, call.global_mask)
        if is_listed is not None:
            self.set_arrays(is_listed=is_listed)
        if call.dropout_p > 0:
            self.dropout_p = call.dropout_p
            self.set_dropout_words()

    def set_rows(self, **tensors: torch.Tensor) -> None:
        """Points fields at tensors [batch, heads, length, head_dim] of any strides."""
        for name, tensor in tensors.items():
            if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
                tensor = tensor.contiguous()
            self.point_to_rows(name, tensor)

    def _set_span(self, span_length: torch.Tensor, ramp: float) -> None:
        """The span's log weight and its slope as tables over the offset key - query, wide enough
        for every tile.
        """
        margin = self.query_block_size + 2 * self.key_block_size + 64
        center = self.left + margin
        offset = torch.arange(center + self.right + margin + 1) - center
        weight = (span_length[:, None] + ramp - offset.abs()) / ramp
        log_weight = weight.clamp(MIN_WEIGHT, 1.0).log().masked_fill(weight <= 0, -torch.inf)
        is_flat = (weight < MIN_WEIGHT) | (weight > 1)
        slope = (weight * ramp).reciprocal().masked_fill(is_flat, 0.0)
        self.span_columns, self.span_center = offset.numel(), center
        self.set_arrays(span_length=span_length, span_log_weight=log_weight, span_slope=slope)

    def run(self, function: str) -> None:
        if self.call.query.numel() == 0:
            return  # the lists of no sequence have no place in memory
        library = kernel_library("cpu")
        assert library.adaptive_attention_arguments_size() == ctypes.sizeof(self)
        status = getattr(library, function)(ctypes.byref(self))
        if status != 0:
            raise (MemoryError if status == 1 else ValueError)(_ERRORS[status])


def _broadcast_strides(tensor: torch.Tensor) -> tuple[int, int]:
    """Strides of batch and head, in rows, of a contiguous [batch or 1, heads or 1, rows, entries];
    0 where shared.
    """
    batches, heads, rows, _ = tensor.shape
    return (heads * rows if batches > 1 else 0), (rows if heads > 1 else 0)
