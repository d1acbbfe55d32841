"""Calls the C++ kernels of csrc/cpu: fills their argument struct from tensors, nothing else."""

import ctypes

import torch

from adaptive_longformer.attention.global_rows import pack_global_tokens
from adaptive_longformer.attention.kernels.kernel_call import KernelCall, RowTensor, fields
from adaptive_longformer.attention.kernels.load import kernel_library
from adaptive_longformer.attention.memory_format import like_projection
from adaptive_longformer.attention.operator import OperatorArguments
from adaptive_longformer.attention.reference import MIN_WEIGHT

ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ERRORS = {
    1: "the compiled attention kernel ran out of memory",
    2: "the layout has counts or key blocks out of range, BlockLayout.validate() tells which",
}


class _Arguments(ctypes.Structure):
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


def forward(arguments: OperatorArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp."""
    call, query = _Call(arguments), arguments.query
    output = like_projection(query)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    call.set_rows(output=output)
    call.set_arrays(lse=lse)
    call.run("adaptive_attention_forward")
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
    grads = like_projection(query), like_projection(key), like_projection(value)
    call.set_rows(output=output, grad_output=grad_output)
    call.set_rows(grad_query=grads[0], grad_key=grads[1], grad_value=grads[2])
    call.set_arrays(lse=lse, grad_lse=grad_lse)
    grad_bias = grad_span = None
    if call.entry_bias is not None:
        shape = (*query.shape[:2], *call.key_blocks.shape[2:])
        grad_bias = torch.zeros(shape, dtype=torch.float32)
        call.set_arrays(grad_entry_bias=grad_bias)
    if call.span_length is not None:
        shape = (*query.shape[:2], call.key_blocks.shape[2])
        grad_span = torch.empty(shape, dtype=torch.float32)
        call.set_arrays(grad_span=grad_span)
    call.run("adaptive_attention_backward")
    return *grads, call.reduce_entry_bias(grad_bias), call.reduce_span(grad_span)


class _Call(KernelCall):
    def __init__(self, inputs: OperatorArguments) -> None:
        arguments, query = _Arguments(), inputs.query
        super().__init__(inputs, arguments)
        arguments.batch, arguments.heads, arguments.length, arguments.head_dim = query.shape
        arguments.element_type = ELEMENT_TYPES[query.dtype]
        arguments.query_block_size = inputs.query_block_size
        arguments.key_block_size = inputs.key_block_size
        arguments.is_causal = inputs.is_causal
        arguments.scale = inputs.scale
        arguments.num_threads = torch.get_num_threads()
        self.set_rows(query=query, key=inputs.key, value=inputs.value)

        layout = inputs.layout()
        self.key_blocks = layout.key_blocks
        self.set_arrays(
            key_blocks=layout.key_blocks.int(),
            counts=layout.counts.int(),
            flags=layout.flags.expand(layout.key_blocks.shape).int(),
        )
        arguments.num_query_blocks, arguments.max_entries = self.key_blocks.shape[2:]
        strides = _broadcast_strides(self.key_blocks)
        arguments.list_batch_stride, arguments.list_head_stride = strides
        self.set_window(layout.window)
        if self.entry_bias is not None:
            self.set_arrays(entry_bias=self.entry_bias.float())
            strides = _broadcast_strides(self.entry_bias)
            arguments.bias_batch_stride, arguments.bias_head_stride = strides
        if self.span_length is not None:
            self._set_span(self.span_length.detach().float(), inputs.span_ramp)

        is_listed = inputs.attention_mask
        if inputs.attention_mask is not None:
            self.set_arrays(is_padding=~inputs.attention_mask)
        if inputs.global_mask is not None:
            is_ordinary = ~inputs.global_mask
            is_listed = is_ordinary if is_listed is None else is_listed & is_ordinary
            positions = pack_global_tokens(inputs.global_mask, inputs.max_global_tokens)
            arguments.num_global = positions.shape[1]
            self.set_arrays(global_positions=positions)
        if is_listed is not None:
            self.set_arrays(is_listed=is_listed)
        if inputs.dropout_p > 0:
            arguments.dropout_p = inputs.dropout_p
            self.set_dropout_words(inputs)

    def set_rows(self, **tensors: torch.Tensor) -> None:
        """Points fields at tensors [batch, heads, length, head_dim] of any strides."""
        for name, tensor in tensors.items():
            if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
                tensor = tensor.contiguous()
            setattr(self.arguments, name, self.row_tensor(tensor))

    def _set_span(self, span_length: torch.Tensor, ramp: float) -> None:
        """The span's log weight and its slope as tables over the offset key - query, wide enough
        for every tile.
        """
        arguments = self.arguments
        margin = arguments.query_block_size + 2 * arguments.key_block_size + 64
        center = arguments.left + margin
        offset = torch.arange(center + arguments.right + margin + 1) - center
        weight = (span_length[:, None] + ramp - offset.abs()) / ramp
        log_weight = weight.clamp(MIN_WEIGHT, 1.0).log().masked_fill(weight <= 0, -torch.inf)
        is_flat = (weight < MIN_WEIGHT) | (weight > 1)
        slope = (weight * ramp).reciprocal().masked_fill(is_flat, 0.0)
        arguments.span_columns, arguments.span_center = offset.numel(), center
        self.set_arrays(span_length=span_length, span_log_weight=log_weight, span_slope=slope)

    def run(self, function: str) -> None:
        if self.query.numel() == 0:
            return  # the lists of no sequence have no place in memory
        library = kernel_library("cpu")
        assert library.adaptive_attention_arguments_size() == ctypes.sizeof(_Arguments)
        status = getattr(library, function)(ctypes.byref(self.arguments))
        if status != 0:
            raise (MemoryError if status == 1 else ValueError)(_ERRORS[status])


def _broadcast_strides(tensor: torch.Tensor) -> tuple[int, int]:
    """Strides of batch and head, in rows, of a contiguous [batch or 1, heads or 1, rows, entries];
    0 where shared.
    """
    batches, heads, rows, _ = tensor.shape
    return (heads * rows if batches > 1 else 0), (rows if heads > 1 else 0)
