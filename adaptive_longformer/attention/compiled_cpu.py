"""Calls the C++ kernels of csrc/cpu: fills their argument struct from tensors, nothing else."""

import ctypes

import torch

from adaptive_longformer.attention.dropout import column_keys, row_keys, threshold
from adaptive_longformer.attention.extension import kernel_library
from adaptive_longformer.attention.global_rows import pack_global_tokens
from adaptive_longformer.attention.memory_format import like_projection
from adaptive_longformer.attention.reference import MIN_WEIGHT
from adaptive_longformer.patterns.block_layout import block_layout
from adaptive_longformer.patterns.pattern import pattern_from_spec
from adaptive_longformer.patterns.sliding_window import SlidingWindow

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


def forward(query: torch.Tensor, *inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp; the arguments are those of `compiled_attention`."""
    call = _Call(query, *inputs)
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
    *inputs,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key, value, entry_bias and span_length (empty where that is None)."""
    call = _Call(*inputs)
    query, key, value = inputs[:3]
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

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pattern: str,
        key_blocks: torch.Tensor | None,
        counts: torch.Tensor | None,
        flags: torch.Tensor | None,
        query_block_size: int,
        key_block_size: int,
        layout_window: str,
        layout_pattern: str,
        entry_bias: torch.Tensor | None,
        span_length: torch.Tensor | None,
        span_ramp: float,
        attention_mask: torch.Tensor | None,
        global_mask: torch.Tensor | None,
        is_causal: bool,
        scale: float,
        dropout_p: float,
        dropout_seed: torch.Tensor | None,
    ) -> None:
        self.query = query
        self.entry_bias, self.span_length = entry_bias, span_length
        self._kept_alive: list[torch.Tensor] = []
        self.arguments = arguments = _Arguments()
        batch, heads, length, _ = query.shape
        arguments.batch, arguments.heads, arguments.length, arguments.head_dim = query.shape
        arguments.element_type = ELEMENT_TYPES[query.dtype]
        arguments.query_block_size = query_block_size
        arguments.key_block_size = key_block_size
        arguments.is_causal = is_causal
        arguments.scale = scale
        arguments.num_threads = torch.get_num_threads()
        self.set_rows(query=query, key=key, value=value)

        window = pattern_from_spec(layout_window) if layout_window else None
        if key_blocks is None or counts is None or flags is None:
            layout = block_layout(
                pattern_from_spec(pattern),
                length,
                query_block_size=query_block_size,
                key_block_size=key_block_size,
                num_heads=heads,
            )
            key_blocks, counts, flags = layout.key_blocks, layout.counts, layout.flags
            window = layout.window
        self.key_blocks = key_blocks
        self.set_arrays(
            key_blocks=key_blocks.int(),
            counts=counts.int(),
            flags=flags.expand(key_blocks.shape).int(),
        )
        arguments.num_query_blocks, arguments.max_entries = key_blocks.shape[2:]
        arguments.list_batch_stride, arguments.list_head_stride = _broadcast_strides(key_blocks)
        if window is not None:
            assert isinstance(window, SlidingWindow) and window.right is not None
            arguments.has_window = 1
            arguments.left, arguments.right = min(window.left, length), min(window.right, length)
        if entry_bias is not None:
            self.set_arrays(entry_bias=entry_bias.float())
            arguments.bias_batch_stride, arguments.bias_head_stride = _broadcast_strides(entry_bias)
        if span_length is not None:
            self._set_span(span_length.detach().float(), span_ramp)

        is_listed = attention_mask
        if attention_mask is not None:
            self.set_arrays(is_padding=~attention_mask)
        if global_mask is not None:
            is_listed = ~global_mask if is_listed is None else is_listed & ~global_mask
            positions = pack_global_tokens(global_mask)
            arguments.num_global = positions.shape[1]
            self.set_arrays(global_positions=positions)
        if is_listed is not None:
            self.set_arrays(is_listed=is_listed)
        if dropout_p > 0:
            assert dropout_seed is not None
            arguments.dropout_p, arguments.dropout_threshold = dropout_p, threshold(dropout_p)
            self.set_arrays(
                row_words=row_keys(dropout_seed, batch, heads, length),
                column_words=column_keys(dropout_seed, length),
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
