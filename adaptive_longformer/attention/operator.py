"""What the operators of the block-sparse backends share: schema, fake results and autograd."""

from collections.abc import Callable

import torch

from adaptive_longformer.attention.call import AttentionCall
from adaptive_longformer.attention.global_rows import merge_global_rows
from adaptive_longformer.attention.memory_format import like_projection

DEFAULT_BLOCK_SIZE = 64
# Where the tensors with a gradient stand among the arguments.
ENTRY_BIAS, SPAN_LENGTH = 11, 12


def operator_arguments(call: AttentionCall) -> tuple:
    """The arguments of an operator with the schema of `blocked_attention`."""
    layout = call.layout
    return (
        call.query,
        call.key,
        call.value,
        call.pattern.spec if call.pattern is not None else "",
        layout.key_blocks if layout is not None else None,
        layout.counts if layout is not None else None,
        layout.flags if layout is not None else None,
        layout.query_block_size if layout is not None else DEFAULT_BLOCK_SIZE,
        layout.key_block_size if layout is not None else DEFAULT_BLOCK_SIZE,
        layout.window.spec if layout is not None and layout.window is not None else "",
        layout.pattern.spec if layout is not None and layout.pattern is not None else "",
        call.entry_bias,
        call.span.length if call.span is not None else None,
        call.span.ramp if call.span is not None else 1.0,
        call.attention_mask,
        call.global_mask,
        call.is_causal,
        call.scale,
        call.dropout_p,
        call.dropout_seed,
    )


def run_operator(operator: Callable, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of a call, by an operator with the schema of `blocked_attention`."""
    output, lse = operator(*operator_arguments(call))
    if call.global_mask is None:
        return output, lse
    return merge_global_rows(output, lse, call)


def fake_forward(query: torch.Tensor, *_) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes, types and strides of the output and the log-sum-exp."""
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    return like_projection(query), query.new_empty(query.shape[:3], dtype=lse_dtype)


def fake_backward(
    grad_output, grad_lse, output, lse, query, key, value, *rest
) -> tuple[torch.Tensor, ...]:
    """Shapes, types and strides of the gradients of query, key, value, entry bias and span."""
    entry_bias, span_length = rest[ENTRY_BIAS - 3], rest[SPAN_LENGTH - 3]
    return (
        like_projection(query),
        like_projection(key),
        like_projection(value),
        key.new_zeros(0) if entry_bias is None else torch.empty_like(entry_bias),
        key.new_zeros(0) if span_length is None else torch.empty_like(span_length),
    )


def register_autograd(forward, backward: Callable) -> None:
    """Makes backward(grad_output, grad_lse, output, lse, *inputs) the gradient of `forward`."""

    def setup_context(ctx, inputs, output) -> None:
        ctx.is_tensor = [isinstance(value, torch.Tensor) for value in inputs]
        ctx.plain = [value for value in inputs if not isinstance(value, torch.Tensor)]
        tensors = (value for value in inputs if isinstance(value, torch.Tensor))
        ctx.save_for_backward(*output, *tensors)

    def run_backward(ctx, grad_output, grad_lse):
        output, lse, *tensors = ctx.saved_tensors
        tensor, plain = iter(tensors), iter(ctx.plain)
        inputs = [next(tensor) if is_tensor else next(plain) for is_tensor in ctx.is_tensor]
        results = backward(grad_output, grad_lse, output, lse, *inputs)
        grads: list[torch.Tensor | None] = [None] * len(inputs)
        grads[:3] = results[:3]
        grads[ENTRY_BIAS] = results[3] if inputs[ENTRY_BIAS] is not None else None
        grads[SPAN_LENGTH] = results[4] if inputs[SPAN_LENGTH] is not None else None
        return tuple(grads)

    forward.register_autograd(run_backward, setup_context=setup_context)
