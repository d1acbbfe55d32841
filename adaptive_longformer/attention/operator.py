"""What the operators of the block-sparse backends share: schema, fake results and autograd."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from adaptive_longformer.attention.autocast import without_autocast
from adaptive_longformer.attention.call import AttentionCall
from adaptive_longformer.attention.cuda_graphs import OUTSIDE_OF_GRAPHS
from adaptive_longformer.attention.global_rows import merge_global_rows
from adaptive_longformer.attention.memory_format import like_projection
from adaptive_longformer.patterns.block_layout import BlockLayout, block_layout
from adaptive_longformer.patterns.pattern import Pattern, pattern_from_spec

DEFAULT_BLOCK_SIZE = 64
# Where the tensors with a gradient stand among the arguments.
ENTRY_BIAS, SPAN_LENGTH = 11, 12


class OperatorArguments(NamedTuple):
    """An `AttentionCall` in the types that a torch.library operator takes.

    Patterns are given as their specs ("" where there is none), a layout as its tensors. Global rows
    are ordinary rows here; `run_operator` replaces them.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    pattern: str
    key_blocks: torch.Tensor | None
    counts: torch.Tensor | None
    flags: torch.Tensor | None
    query_block_size: int
    key_block_size: int
    layout_window: str
    layout_pattern: str
    entry_bias: torch.Tensor | None
    span_length: torch.Tensor | None
    span_ramp: float
    attention_mask: torch.Tensor | None
    global_mask: torch.Tensor | None
    max_global_tokens: int | None
    is_causal: bool
    scale: float
    dropout_p: float
    dropout_seed: torch.Tensor | None

    def layout(self) -> BlockLayout:
        """The lists of the call: those it was given, or those of its pattern."""
        length = self.query.shape[2]
        if self.key_blocks is None:
            return block_layout(
                pattern_from_spec(self.pattern),
                length,
                query_block_size=self.query_block_size,
                key_block_size=self.key_block_size,
                num_heads=self.query.shape[1],
                device=self.query.device,
            )
        assert self.counts is not None and self.flags is not None
        window, pattern = (
            pattern_from_spec(spec) if spec else None
            for spec in (self.layout_window, self.layout_pattern)
        )
        return BlockLayout(
            key_blocks=self.key_blocks,
            counts=self.counts,
            flags=self.flags,
            query_block_size=self.query_block_size,
            key_block_size=self.key_block_size,
            length=length,
            window=window,  # type: ignore[arg-type]
            pattern=pattern,
        )


_ARGUMENTS = """
    Tensor query, Tensor key, Tensor value, str pattern, Tensor? key_blocks, Tensor? counts,
    Tensor? flags, SymInt query_block_size, SymInt key_block_size, str layout_window,
    str layout_pattern, Tensor? entry_bias, Tensor? span_length, float span_ramp,
    Tensor? attention_mask, Tensor? global_mask, int? max_global_tokens, bool is_causal,
    float scale, float dropout_p, Tensor? dropout_seed
"""
_FORWARD = f"({_ARGUMENTS}) -> (Tensor, Tensor)"
_BACKWARD = (
    f"(Tensor grad_output, Tensor grad_lse, Tensor output, Tensor lse, {_ARGUMENTS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def operator_arguments(call: AttentionCall) -> OperatorArguments:
    """The call in the types of an operator."""
    layout, span = call.layout, call.span
    return OperatorArguments(
        query=call.query,
        key=call.key,
        value=call.value,
        pattern=_spec(call.pattern),
        key_blocks=None if layout is None else layout.key_blocks,
        counts=None if layout is None else layout.counts,
        flags=None if layout is None else layout.flags,
        query_block_size=DEFAULT_BLOCK_SIZE if layout is None else layout.query_block_size,
        key_block_size=DEFAULT_BLOCK_SIZE if layout is None else layout.key_block_size,
        layout_window="" if layout is None else _spec(layout.window),
        layout_pattern="" if layout is None else _spec(layout.pattern),
        entry_bias=call.entry_bias,
        span_length=None if span is None else span.length,
        span_ramp=1.0 if span is None else span.ramp,
        attention_mask=call.attention_mask,
        global_mask=call.global_mask,
        max_global_tokens=call.max_global_tokens,
        is_causal=call.is_causal,
        scale=call.scale,
        dropout_p=call.dropout_p,
        dropout_seed=call.dropout_seed,
    )


def _spec(pattern: Pattern | None) -> str:
    return "" if pattern is None else pattern.spec


def define_operator(
    name: str,
    forward: Callable[[OperatorArguments], tuple[torch.Tensor, torch.Tensor]],
    backward: Callable[..., tuple[torch.Tensor, ...]],
) -> Callable:
    """Registers `adaptive_longformer::name` with fake results and its gradient.

    Args:
        name: of the operator; its backward pass is an operator `name_backward`.
        forward: gives output [batch, heads, length, head_dim] and log-sum-exp [batch, heads,
            length].
        backward: takes grad_output, grad_lse, output, lse and the arguments; gives the gradients of
            query, key, value, entry bias and span, empty where there is none.
    """

    @without_autocast
    def run_forward(*arguments):
        return forward(OperatorArguments(*arguments))

    @without_autocast
    def run_backward(grad_output, grad_lse, output, lse, *arguments):
        return backward(grad_output, grad_lse, output, lse, OperatorArguments(*arguments))

    name = f"adaptive_longformer::{name}"
    define = partial(torch.library.custom_op, mutates_args=(), tags=OUTSIDE_OF_GRAPHS)
    operator = define(name, run_forward, schema=_FORWARD)
    operator.register_fake(_fake_forward)
    gradient = define(f"{name}_backward", run_backward, schema=_BACKWARD)
    gradient.register_fake(_fake_backward)
    _register_autograd(operator, gradient)
    return operator


def run_operator(operator: Callable, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of a call, by an operator of `define_operator`."""
    output, lse = operator(*operator_arguments(call))
    if call.global_mask is None:
        return output, lse
    return merge_global_rows(output, lse, call)


def _fake_forward(query: torch.Tensor, *_) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes, types and strides of the output and the log-sum-exp."""
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    return like_projection(query), query.new_empty(query.shape[:3], dtype=lse_dtype)


def _fake_backward(
    grad_output, grad_lse, output, lse, query, key, value, *rest
) -> tuple[torch.Tensor, ...]:
    """Shapes, types and strides of the gradients of query, key, value, entry bias and span."""
    entry_bias, span_length = rest[ENTRY_BIAS - 3], rest[SPAN_LENGTH - 3]
    return (
        like_projection(query),
        like_projection(key),
        like_projection(value),
        key.new_zeros(0) if entry_bias is None else entry_bias.new_empty(entry_bias.shape),
        key.new_zeros(0) if span_length is None else span_length.new_empty(span_length.shape),
    )


def _register_autograd(forward, backward: Callable) -> None:
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
