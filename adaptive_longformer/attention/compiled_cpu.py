"""Calls the C++ kernels of csrc/cpu: fills their argument struct from tensors, nothing else."""

import ctypes

import torch

from adaptive_longformer.attention.dropout import column_keys, row_keys, threshold
from adaptive_longformer.attention.extension import kernel_library
from adaptive_longformer.attention.global_rows import pack_global_tokens
from adaptive_longformer.attention.memory_format import like_projection
from adaptive_longformer.attention.operator import OperatorArguments
from adaptive_longformer.attention.reference import MIN_WEIGHT

ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ERRORS = {
    1: "the compiled attention kernel ran out of memory",
    2: "the layout has counts or key blocks out of range, BlockLayout.validate() tells which",
}


class _RowTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
    ]


def _fields(kind, names: str) -> list:
    return [(name, kind) for name in names.split()]


class _Arguments(ctypes.Structure):
    """`Arguments` of csrc/cpu/arguments.h, field by field."""

    _fields_ = [
        *_fields(ctypes.c_int64, "batch heads length head_dim element_type"),
        *_fields(ctypes.c_int64, "query_block_size key_block_size is_causal has_window left right"),
        *_fields(ctypes.c_double, "scale dropout_p"),
        *_fields(ctypes.c_int64, "dropout_threshold num_threads"),
        *_fields(_RowTensor, "query key value"),
        *_fields(ctypes.c_void_p, "key_blocks counts flags"),
        *_fields(ctypes.c_int64, "list_batch_stride list_head_stride num_query_blocks max_entries"),
        *_fields(ctypes.c_void_p, "entry_bias"),
        *_fields(ctypes.c_int64, "bias_batch_stride bias_head_stride"),
        *_fields(ctypes.c_void_p, "is_listed is_padding global_positions"),
        *_fields(ctypes.c_int64, "num_global"),
        *_fields(ctypes.c_void_p, "row_words column_words"),
        *_fields(ctypes.c_void_p, "span_length span_log_weight span_slope"),
        *_fields(ctypes.c_int64, "span_columns span_center"),
        *_fields(_RowTensor, "output"),
        *_fields(ctypes.c_void_p, "lse"),
        *_fields(_RowTensor, "grad_output"),
        *_fields(ctypes.c_void_p, "grad_lse"),
        *_fields(_RowTensor, "grad_query grad_key grad_value"),
        *_fields(ctypes.c_void_p, "grad_entry_bias grad_span"),
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


class _Call:
    """One call of the library, with the tensors that its struct points into."""

    def __init__(self, inputs: OperatorArguments) -> None:
        query, self.query = inputs.query, inputs.query
        self.entry_bias, self.span_length = inputs.entry_bias, inputs.span_length
        self._kept_alive: list[torch.Tensor] = []
        self.arguments = arguments = _Arguments()
        batch, heads, length, _ = query.shape
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
        if layout.window is not None:
            window = layout.window
            assert window.right is not None
            arguments.has_window = 1
            arguments.left, arguments.right = min(window.left, length), min(window.right, length)
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
            positions = pack_global_tokens(inputs.global_mask)
            arguments.num_global = positions.shape[1]
            self.set_arrays(global_positions=positions)
        if is_listed is not None:
            self.set_arrays(is_listed=is_listed)
        if inputs.dropout_p > 0:
            assert inputs.dropout_seed is not None
            arguments.dropout_p = inputs.dropout_p
            arguments.dropout_threshold = threshold(inputs.dropout_p)
            self.set_arrays(
                row_words=row_keys(inputs.dropout_seed, batch, heads, length),
                column_words=column_keys(inputs.dropout_seed, length),
            )

    def set_rows(self, **tensors: torch.Tensor) -> None:
        """Points fields at tensors [batch, heads, length, head_dim] of any strides."""
        for name, tensor in tensors.items():
            if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
                tensor = tensor.contiguous()
            self._kept_alive.append(tensor)
            setattr(self.arguments, name, _RowTensor(tensor.data_ptr(), *tensor.stride()[:3]))

    def set_arrays(self, **tensors: torch.Tensor) -> None:
        """Points fields at the elements of tensors."""
        for name, tensor in tensors.items():
            tensor = tensor.contiguous()
            self._kept_alive.append(tensor)
            setattr(self.arguments, name, tensor.data_ptr())

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
        library = kernel_library("cpu")
        assert library.adaptive_attention_arguments_size() == ctypes.sizeof(_Arguments)
        status = getattr(library, function)(ctypes.byref(self.arguments))
        if status != 0:
            raise (MemoryError if status == 1 else ValueError)(_ERRORS[status])

    def reduce_entry_bias(self, grad: torch.Tensor | None) -> torch.Tensor:
        if grad is None or self.entry_bias is None:
            return self.query.new_zeros(0)
        return grad.sum_to_size(self.entry_bias.shape).to(self.entry_bias.dtype)

    def reduce_span(self, grad: torch.Tensor | None) -> torch.Tensor:
        if grad is None or self.span_length is None:
            return self.query.new_zeros(0)
        return grad.sum(dim=(0, 2)).to(self.span_length.dtype)


def _broadcast_strides(tensor: torch.Tensor) -> tuple[int, int]:
    """Strides of batch and head, in rows, of a contiguous [batch or 1, heads or 1, rows, entries];
    0 where shared.
    """
    batches, heads, rows, _ = tensor.shape
    return (heads * rows if batches > 1 else 0), (rows if heads > 1 else 0)
