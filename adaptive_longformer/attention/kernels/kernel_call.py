"""What calls of the CPU and the CUDA library have in common: a struct that points into tensors."""

import ctypes
from typing import Any

import torch

from adaptive_longformer.attention.dropout import column_keys, row_keys, threshold
from adaptive_longformer.attention.operator import OperatorArguments
from adaptive_longformer.patterns.sliding_window import SlidingWindow


class RowTensor(ctypes.Structure):
    """`RowTensor` of the kernels' arguments headers; strides in elements."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
    ]


def fields(kind: type, names: str) -> list[tuple[str, type]]:
    """Fields of one type of a ctypes structure."""
    return [(name, kind) for name in names.split()]


class KernelCall:
    """One call of a library, with the tensors that its struct points into.

    Args:
        inputs: of the operator.
        arguments: the library's struct, empty.
    """

    def __init__(self, inputs: OperatorArguments, arguments: Any) -> None:
        self.query, self.arguments = inputs.query, arguments
        self.entry_bias, self.span_length = inputs.entry_bias, inputs.span_length
        self._kept_alive: list[torch.Tensor] = []

    def row_tensor(self, tensor: torch.Tensor) -> RowTensor:
        """A [batch, heads, length, head_dim] whose last dimension is contiguous, kept alive."""
        self._kept_alive.append(tensor)
        return RowTensor(tensor.data_ptr(), *tensor.stride()[:3])

    def set_arrays(self, **tensors: torch.Tensor) -> None:
        """Points fields at the elements of tensors."""
        for name, tensor in tensors.items():
            tensor = tensor.contiguous()
            self._kept_alive.append(tensor)
            setattr(self.arguments, name, tensor.data_ptr())

    def set_window(self, window: SlidingWindow | None) -> None:
        """What WINDOW entries mean, if there are any."""
        if window is None:
            return
        assert window.right is not None
        length = self.query.shape[2]
        self.arguments.has_window = 1
        self.arguments.left = min(window.left, length)
        self.arguments.right = min(window.right, length)

    def set_dropout_words(self, inputs: OperatorArguments) -> None:
        """The threshold and the words that dropout compares with it; for dropout_p > 0."""
        assert inputs.dropout_seed is not None
        batch, heads, length, _ = self.query.shape
        self.arguments.dropout_threshold = threshold(inputs.dropout_p)
        self.set_arrays(
            row_words=row_keys(inputs.dropout_seed, batch, heads, length),
            column_words=column_keys(inputs.dropout_seed, length),
        )

    def reduce_entry_bias(self, grad: torch.Tensor | None) -> torch.Tensor:
        """The gradient of the entry bias in its own shape, empty where there is none."""
        if grad is None or self.entry_bias is None:
            return self.query.new_zeros(0)
        return grad.sum_to_size(self.entry_bias.shape).to(self.entry_bias.dtype).contiguous()

    def reduce_span(self, grad: torch.Tensor | None) -> torch.Tensor:
        """The gradient of the span in its own shape, empty where there is none."""
        if grad is None or self.span_length is None:
            return self.query.new_zeros(0)
        return grad.sum(dim=(0, 2)).to(self.span_length.dtype)
