"""What the argument structs of the CPU and the CUDA library have in common."""

import ctypes
from collections.abc import Container, Sequence

import torch

from adaptive_longformer.attention.call import AttentionCall
from adaptive_longformer.attention.dropout import column_keys, row_keys, threshold
from adaptive_longformer.patterns.block_layout import check_block_sizes, split_window
from adaptive_longformer.patterns.random_blocks import RandomBlocks
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
        check_shapes(call)
        self.call = call
        self._kept_alive: list[torch.Tensor] = []
        self.batch, self.heads, self.length, self.head_dim = call.query.shape
        self.query_block_size = call.block_sizes[0]
        self.is_causal, self.scale = call.is_causal, call.scale

    def point_to_rows(self, name: str, tensor: torch.Tensor) -> None:
        """Points a field at a [batch, heads, length, head_dim] whose last dimension is
        contiguous.
        """
        query = self.call.query
        if (tensor.shape, tensor.dtype, tensor.device) != (query.shape, query.dtype, query.device):
            raise ValueError(f"{name} is not of the shape, type and device of the query")
        self._kept_alive.append(tensor)
        setattr(self, name, RowTensor(tensor.data_ptr(), *tensor.stride()[:3]))

    def set_arrays(self, **tensors: torch.Tensor) -> None:
        """Points fields at the elements of tensors."""
        for name, tensor in tensors.items():
            tensor = tensor.contiguous()
            if name in ("lse", "grad_lse") and tensor.shape != self.call.query.shape[:3]:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not that of the rows")
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


def gradients_of_biases(
    call: AttentionCall, grad_bias: torch.Tensor | None, grad_span: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients of entry_bias and span.length in their shapes and types.

    Args:
        call: whose gradients these are.
        grad_bias: [batch, heads, query_blocks, entries], or None.
        grad_span: [batch, heads, query_blocks], or None.
    """
    bias, span = call.entry_bias, call.span
    if grad_bias is not None and bias is not None:
        grad_bias = grad_bias.sum_to_size(bias.shape).to(bias.dtype).contiguous()
    if grad_span is not None and span is not None:
        grad_span = grad_span.sum(dim=(0, 2)).to(span.length.dtype)
    return grad_bias, grad_span


def why_not_whole_blocks(call: AttentionCall) -> str | None:
    """None if the pattern beside the window lets all or no pairs of a tile through, or why not."""
    if call.layout is not None:
        pattern = call.layout.pattern
    else:
        assert call.pattern is not None
        pattern = split_window(call.pattern)[1]
    query_block, key_block = call.block_sizes
    for part in pattern.parts if pattern is not None else ():
        is_aligned = (
            isinstance(part, RandomBlocks)
            and part.block_size % query_block == 0
            and part.block_size % key_block == 0
        )
        if not is_aligned:
            return f"{part} is not made of whole blocks of {query_block} x {key_block} tokens"
    return None


def check_shapes(call: AttentionCall) -> None:
    """Raises ValueError on what would be read behind its end: an operator may be called directly,
    without the checks of `sparse_attention`.
    """
    batch, heads, length, head_dim = call.query.shape
    layout, keys, span = call.layout, call.global_keys, call.span
    of_tokens = ({batch}, {length})
    sized: list[tuple[str, torch.Tensor | None, torch.dtype | None, Sequence[Container[int]]]] = [
        (name, tensor, call.query.dtype, ({batch}, {heads}, {length}, {head_dim}))
        for name, tensor in (("key", call.key), ("value", call.value))
    ]
    sized.append(("attention_mask", call.attention_mask, torch.bool, of_tokens))
    if keys is not None:
        sized.append(("global_mask", keys.mask, torch.bool, of_tokens))
        sized.append(
            ("global_positions", keys.positions, torch.int64, ({batch}, range(length + 1)))
        )
    if span is not None:
        sized.append(("span_length", span.length, None, ({heads},)))
    if call.dropout_p > 0:
        sized.append(("dropout_seed", call.dropout_seed, torch.int64, ()))
    if layout is not None:
        check_block_sizes("layout", query=layout.query_block_size, key=layout.key_block_size)
        shape = layout.key_blocks.shape
        entries = ({1, batch}, {1, heads}, {layout.num_query_blocks}, {shape[-1]})
        sized.append(("key_blocks", layout.key_blocks, None, entries))
        sized.append(("counts", layout.counts, None, [{size} for size in shape[:-1]]))
        sized.append(("flags", layout.flags, None, [{1, size} for size in shape]))
        sized.append(("entry_bias", call.entry_bias, None, entries))
    for name, tensor, dtype, allowed in sized:
        if tensor is None:
            continue
        fits = len(allowed) == tensor.ndim and dtype in (None, tensor.dtype)
        if not fits or any(size not in each for size, each in zip(tensor.shape, allowed)):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and {tensor.dtype}, which does not fit "
                f"the query of shape {tuple(call.query.shape)} and its lists"
            )
