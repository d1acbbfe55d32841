"""What the argument structs of the CPU and the CUDA library have in common."""

import ctypes

import torch

from adaptive_longformer.attention.call import AttentionCall
from adaptive_longformer.attention.dropout import column_keys, row_keys, threshold
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


class KernelArguments(ctypes.Structure):
    """The argument struct of a library for a call, and the tensors that it points into.

    Its fields are those of the library's header, see the subclasses.

    Attributes:
        call: what is computed.
    """

    def __init__(self, call: AttentionCall) -> None:
        super().__init__()
        self.call = call
        self._kept_alive: list[torch.Tensor] = []
        self.batch, self.heads, self.length, self.head_dim = call.query.shape
        self.query_block_size = call.block_sizes[0]
        self.is_causal, self.scale = call.is_causal, call.scale

    def point_to_rows(self, name: str, tensor: torch.Tensor) -> None:
        """Points a field at a [batch, heads, length, head_dim] whose last dimension is
        contiguous.
        """
        self._kept_alive.append(tensor)
        setattr(self, name, RowTensor(tensor.data_ptr(), *tensor.stride()[:3]))

    def set_arrays(self, **tensors: torch.Tensor) -> None:
        """Points fields at the elements of tensors."""
        for name, tensor in tensors.items():
            tensor = tensor.contiguous()
            self._kept_alive.append(tensor)
            setattr(self, name, tensor.data_ptr())

    def set_window(self, window: SlidingWindow | None) -> None:
        """What WINDOW entries mean, if there are any."""
        if window is None:
            return
        assert window.right is not None
        length = self.call.query.shape[2]
        self.has_window = 1
        self.left, self.right = min(window.left, length), min(window.right, length)

    def set_dropout_words(self) -> None:
        """The threshold and the words that dropout compares with it; for dropout_p > 0."""
        call = self.call
        assert call.dropout_seed is not None
        batch, heads, length, _ = call.query.shape
        self.dropout_threshold = threshold(call.dropout_p)
        self.set_arrays(
            row_words=row_keys(call.dropout_seed, batch, heads, length),
            column_words=column_keys(call.dropout_seed, length),
        )

    def bias_gradients(
        self, grad_bias: torch.Tensor | None, grad_span: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The gradients of entry_bias and span.length in their shapes and types.

        Args:
            grad_bias: [batch, heads, query_blocks, entries], or None.
            grad_span: [batch, heads, query_blocks], or None.
        """
        bias, span = self.call.entry_bias, self.call.span
        if grad_bias is not None and bias is not None:
            grad_bias = grad_bias.sum_to_size(bias.shape).to(bias.dtype).contiguous()
        if grad_span is not None and span is not None:
            grad_span = grad_span.sum(dim=(0, 2)).to(span.length.dtype)
        return grad_bias, grad_span
