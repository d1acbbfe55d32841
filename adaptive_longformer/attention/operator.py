"""A call as a torch.library operator: the one place where it is taken apart and put together again.

The operators of the block-sparse backends share their schema, their fake results, their gradients,
and the rows of global queries.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch

from adaptive_longformer.attention.autocast import without_autocast
from adaptive_longformer.attention.call import AttentionCall, AttentionSpan, GlobalProjections
from adaptive_longformer.attention.cuda_graphs import OUTSIDE_OF_GRAPHS
from adaptive_longformer.attention.global_keys import GlobalKeys
from adaptive_longformer.attention.global_rows import (
    GLOBAL_TENSORS,
    global_gradients,
    write_global_rows,
)
from adaptive_longformer.attention.memory_format import like_projection
from adaptive_longformer.patterns.block_layout import BlockLayout
from adaptive_longformer.patterns.pattern import pattern_from_code

Forward = Callable[[AttentionCall], tuple[torch.Tensor, torch.Tensor]]
Backward = Callable[..., tuple[torch.Tensor | None, ...]]


class OperatorArguments(NamedTuple):
    """An `AttentionCall` in the types that a torch.library operator takes; nothing else sees them.

    `pattern` is the code of the call's pattern, or that of its layout, where there are key_blocks.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    entry_bias: torch.Tensor | None
    span_length: torch.Tensor | None
    query_global: torch.Tensor | None
    key_global: torch.Tensor | None
    value_global: torch.Tensor | None
    hidden_states: torch.Tensor | None
    query_weight: torch.Tensor | None
    query_bias: torch.Tensor | None
    key_weight: torch.Tensor | None
    key_bias: torch.Tensor | None
    value_weight: torch.Tensor | None
    value_bias: torch.Tensor | None
    pattern: Sequence[int]
    window: Sequence[int]
    key_blocks: torch.Tensor | None
    counts: torch.Tensor | None
    flags: torch.Tensor | None
    query_block_size: int
    key_block_size: int
    span_ramp: float
    attention_mask: torch.Tensor | None
    global_mask: torch.Tensor | None
    global_positions: torch.Tensor | None
    is_causal: bool
    scale: float
    dropout_p: float
    dropout_seed: torch.Tensor | None


# The tensors with a gradient come first; those that a kernel of ordinary rows gives before others.
GRADIENTS = OperatorArguments._fields[: OperatorArguments._fields.index("pattern")]
# They are [batch, heads, length, head_dim], their gradients stored as `like_projection` has it.
_PROJECTED = {"output", *GLOBAL_TENSORS, "query", "key", "value"}
_SCHEMA_TYPES = {
    torch.Tensor: "Tensor", torch.Tensor | None: "Tensor?", Sequence[int]: "int[]",
    int: "SymInt", float: "float", bool: "bool",
}  # fmt: skip
_ARGUMENTS = ", ".join(
    f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in OperatorArguments.__annotations__.items()
)


def expand(call: AttentionCall) -> OperatorArguments:
    """The call in the types of an operator."""
    layout, span, keys, qkv = call.layout, call.span, call.global_keys, call.global_qkv
    pattern = call.pattern if layout is None else layout.pattern
    window = None if layout is None else layout.window
    query_block_size, key_block_size = call.block_sizes
    explicit, projections = qkv or (None,) * 3, (None,) * 7
    if isinstance(qkv, GlobalProjections):
        explicit, projections = (None,) * 3, qkv
    return OperatorArguments(
        call.query,
        call.key,
        call.value,
        call.entry_bias,
        None if span is None else span.length,
        *explicit,
        *projections,
        pattern=() if pattern is None else pattern.code,
        window=() if window is None else window.code,
        key_blocks=None if layout is None else layout.key_blocks,
        counts=None if layout is None else layout.counts,
        flags=None if layout is None else layout.flags,
        query_block_size=query_block_size,
        key_block_size=key_block_size,
        span_ramp=1.0 if span is None else span.ramp,
        attention_mask=call.attention_mask,
        global_mask=None if keys is None else keys.mask,
        global_positions=None if keys is None else keys.positions,
        is_causal=call.is_causal,
        scale=call.scale,
        dropout_p=call.dropout_p,
        dropout_seed=call.dropout_seed,
    )


def collapse(arguments: Sequence) -> AttentionCall:
    """The call again, inside of an operator: its global tokens are packed in any case."""
    a = OperatorArguments(*arguments)
    pattern, layout = pattern_from_code(tuple(a.pattern)), None
    if a.key_blocks is not None:
        assert a.counts is not None and a.flags is not None
        layout = BlockLayout(
            a.key_blocks, a.counts, a.flags, a.query_block_size, a.key_block_size,
            a.query.shape[2], cast(Any, pattern_from_code(tuple(a.window))), pattern,
        )  # fmt: skip
        pattern = None
    keys, qkv = None, None
    if a.global_mask is not None:
        keys = GlobalKeys(a.global_mask, GlobalKeys(a.global_mask, a.global_positions).packed())
    if a.hidden_states is not None:
        qkv = GlobalProjections(*(getattr(a, name) for name in GlobalProjections._fields))
    elif a.query_global is not None:
        assert a.key_global is not None and a.value_global is not None
        qkv = (a.query_global, a.key_global, a.value_global)
    return AttentionCall(
        query=a.query,
        key=a.key,
        value=a.value,
        scale=a.scale,
        pattern=pattern,
        layout=layout,
        attention_mask=a.attention_mask,
        is_causal=a.is_causal,
        global_keys=keys,
        global_qkv=qkv,
        entry_bias=a.entry_bias,
        span=None if a.span_length is None else AttentionSpan(a.span_length, a.span_ramp),
        dropout_p=a.dropout_p,
        dropout_seed=a.dropout_seed,
    )


def define_operator(
    name: str,
    forward: Forward,
    backward: Backward,
    tags: Sequence[torch.Tag] = OUTSIDE_OF_GRAPHS,
) -> Callable:
    """Registers `adaptive_longformer::name` with fake results and its gradient.

    Neither function knows of the rows of global queries: these are written over what `forward`
    gives, and `backward` sees rows that see nothing in their place.

    Args:
        name: of the operator; its backward pass is an operator `name_backward`.
        forward: gives output [batch, heads, length, head_dim] and log-sum-exp [batch, heads,
            length].
        backward: takes grad_output, grad_lse, output, lse and the call; gives the gradients of
            query, key, value, entry_bias and span.length, None where the call has no such tensor.
        tags: of both.
    """

    def run_forward(*arguments) -> tuple[torch.Tensor, torch.Tensor]:
        call = collapse(arguments)
        output, lse = forward(call)
        write_global_rows(output, lse, call)
        return output, lse

    def run_backward(grad_output, grad_lse, output, lse, needed, *arguments) -> list[torch.Tensor]:
        call = collapse(arguments)
        if call.global_mask is not None:
            lse = lse.masked_fill(call.global_mask[:, None], -torch.inf)
        results = backward(grad_output, grad_lse, output, lse, call)
        gradients = {
            name: gradient
            for name, gradient in zip(GRADIENTS, results, strict=False)
            if gradient is not None
        }
        gradients.update(global_gradients(grad_output, grad_lse, call, gradients))
        return _only_needed(gradients, GRADIENTS, needed)

    return _register(name, run_forward, run_backward, tags=tags)


def fits_graphs(call: AttentionCall) -> bool:
    """Whether our kernels read nothing back from the device for a call, and keep nothing there: its
    lists are its own, not those of a pattern, and the number of its global tokens is known.
    """
    keys = call.global_keys
    return call.layout is not None and (keys is None or keys.positions is not None)


def run_operator(operator: Callable, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of a call, by an operator of `define_operator`."""
    return operator(*expand(call))


def merge_global_rows(
    output: torch.Tensor, lse: torch.Tensor, call: AttentionCall
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp, computed in another way, with the rows of the call's global queries
    replaced by attention to every key.
    """
    if call.global_qkv is not None:
        # These are read by ordinary rows alone.
        tensors = [tensor.detach() for tensor in (call.query, call.key, call.value)]
        call = replace(call, query=tensors[0], key=tensors[1], value=tensors[2])
    call = replace(call, entry_bias=None, span=None)
    return global_rows(output, lse, *expand(call))


def _only_needed(
    gradients: dict[str, torch.Tensor], names: Sequence[str], needed: Sequence[bool]
) -> list[torch.Tensor]:
    return [gradients[name] for name, is_needed in zip(names, needed, strict=True) if is_needed]


def _register(
    name: str,
    forward: Callable,
    backward: Callable,
    given: tuple[str, ...] = (),
    tags: Sequence[torch.Tag] = OUTSIDE_OF_GRAPHS,
) -> Callable:
    """An operator of the `given` tensors and of a call, which returns output and log-sum-exp, and
    that of its gradients.

    `backward` takes grad_output, grad_lse, output, lse, which gradients are needed, and the call.
    """
    define = partial(torch.library.custom_op, mutates_args=(), tags=tags)
    name = f"adaptive_longformer::{name}"
    tensors = "".join(f"Tensor {tensor}, " for tensor in given)
    schema = f"({tensors}{_ARGUMENTS}) -> (Tensor, Tensor)"
    operator = define(name, without_autocast(forward), schema=schema)
    schema = (
        "(Tensor grad_output, Tensor grad_lse, Tensor output, Tensor lse, bool[] needed, "
        f"{_ARGUMENTS}) -> Tensor[]"
    )
    gradient = define(f"{name}_backward", without_autocast(backward), schema=schema)
    names = (*given, *GRADIENTS)

    def fake_forward(query: torch.Tensor, *_) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the same shape is the output that may be given in place of the query."""
        lse_dtype = torch.promote_types(query.dtype, torch.float32)
        return like_projection(query), query.new_empty(query.shape[:3], dtype=lse_dtype)

    def fake_backward(grad_output, grad_lse, output, lse, needed, *arguments):
        tensors = dict(zip(names, ((output, lse)[: len(given)] + arguments), strict=False))
        gradients = {
            name: like_projection(tensor) if name in _PROJECTED else tensor.new_empty(tensor.shape)
            for name, tensor in tensors.items()
            if tensor is not None
        }
        return _only_needed(gradients, names, needed)

    def setup_context(ctx, inputs, output) -> None:
        inputs = inputs[len(given) :]
        ctx.is_tensor = [isinstance(value, torch.Tensor) for value in inputs]
        ctx.plain = [value for value in inputs if not isinstance(value, torch.Tensor)]
        tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
        ctx.save_for_backward(*output, *tensors)
        ctx.set_materialize_grads(False)

    def run_backward(ctx, grad_output, grad_lse):
        if grad_output is None and grad_lse is None:  # see `with_second_derivatives`
            return (None,) * (len(ctx.is_tensor) + len(given))
        output, lse, *tensors = ctx.saved_tensors
        grad_output = torch.zeros_like(output) if grad_output is None else grad_output
        grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
        tensor, plain = iter(tensors), iter(ctx.plain)
        inputs = [next(tensor) if is_tensor else next(plain) for is_tensor in ctx.is_tensor]
        needed = ctx.needs_input_grad[: len(names)]
        results = iter(gradient(grad_output, grad_lse, output, lse, needed, *inputs))
        grads = [next(results) if is_needed else None for is_needed in needed]
        return *grads, *[None] * (len(inputs) + len(given) - len(grads))

    operator.register_fake(fake_forward)
    gradient.register_fake(fake_backward)
    operator.register_autograd(run_backward, setup_context=setup_context)
    return operator


def _merge_forward(output, lse, *arguments) -> tuple[torch.Tensor, torch.Tensor]:
    output = like_projection(output).copy_(output)
    lse = lse.clone(memory_format=torch.contiguous_format)
    write_global_rows(output, lse, collapse(arguments))
    return output, lse


def _merge_backward(grad_output, grad_lse, output, lse, needed, *arguments) -> list[torch.Tensor]:
    call = collapse(arguments)
    assert call.global_mask is not None
    local = like_projection(grad_output).copy_(grad_output)
    gradients = {
        "output": local.masked_fill_(call.global_mask[:, None, :, None], 0.0),
        "lse": grad_lse.masked_fill(call.global_mask[:, None], 0.0).contiguous(),
    }
    gradients.update(global_gradients(grad_output, grad_lse, call, {}))
    return _only_needed(gradients, ("output", "lse", *GRADIENTS), needed)


global_rows = _register("global_rows", _merge_forward, _merge_backward, ("output", "lse"))
