"""The compiled backend "cpp": block-sparse attention by our own C++ kernels, built at the first use."""

import torch

from adaptive_longformer.attention import compiled_cpu
from adaptive_longformer.attention.call import AttentionCall
from adaptive_longformer.attention.extension import why_unavailable
from adaptive_longformer.attention.operator import (
    DEFAULT_BLOCK_SIZE,
    fake_backward,
    fake_forward,
    register_autograd,
    run_operator,
)
from adaptive_longformer.patterns.block_layout import split_window
from adaptive_longformer.patterns.pattern import Pattern
from adaptive_longformer.patterns.random_blocks import RandomBlocks

# torch.compile takes the answer as a constant instead of tracing a build.
_why_unavailable = torch.compiler.assume_constant_result(why_unavailable)


def cpp_supports(call: AttentionCall) -> str | None:
    """None, or why the C++ kernel for CPUs cannot run the call. Builds the kernel if need be."""
    if call.query.device.type != "cpu":
        return f"tensors are on {call.query.device}, the kernel is for CPUs"
    if call.query.dtype not in compiled_cpu.ELEMENT_TYPES:
        return f"{call.query.dtype} is not one of float32, bfloat16 and float16"
    layout = call.layout
    if layout is not None:
        reason = _why_not_blocks(layout.pattern, layout.query_block_size, layout.key_block_size)
    else:
        assert call.pattern is not None
        rest = split_window(call.pattern)[1]
        reason = _why_not_blocks(rest, DEFAULT_BLOCK_SIZE, DEFAULT_BLOCK_SIZE)
    return reason or _why_unavailable("cpu")


def run_cpp(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [batch, heads, length, head_dim] and log-sum-exp [batch, heads, length] of a call."""
    return run_operator(compiled_attention, call)


def _why_not_blocks(
    pattern: Pattern | None, query_block_size: int, key_block_size: int
) -> str | None:
    """None if the pattern beside the window lets whole tiles through or none of their pairs, else the reason."""
    for part in pattern.parts if pattern is not None else ():
        is_aligned = (
            isinstance(part, RandomBlocks)
            and part.block_size % query_block_size == 0
            and part.block_size % key_block_size == 0
        )
        if not is_aligned:
            return f"{part.spec} is not made of whole blocks of {query_block_size} x {key_block_size} tokens"
    return None


@torch.library.custom_op("adaptive_longformer::compiled_attention", mutates_args=())
def compiled_attention(
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
) -> tuple[torch.Tensor, torch.Tensor]:
    return compiled_cpu.forward(
        query, key, value, pattern, key_blocks, counts, flags, query_block_size, key_block_size, layout_window,
        layout_pattern, entry_bias, span_length, span_ramp, attention_mask, global_mask, is_causal, scale, dropout_p,
        dropout_seed,
    )  # fmt: skip


compiled_attention.register_fake(fake_forward)


@torch.library.custom_op("adaptive_longformer::compiled_attention_backward", mutates_args=())
def _compiled_attention_backward(
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return compiled_cpu.backward(
        grad_output, grad_lse, output, lse, query, key, value, pattern, key_blocks, counts, flags, query_block_size,
        key_block_size, layout_window, layout_pattern, entry_bias, span_length, span_ramp, attention_mask, global_mask,
        is_causal, scale, dropout_p, dropout_seed,
    )  # fmt: skip


_compiled_attention_backward.register_fake(fake_backward)
register_autograd(compiled_attention, _compiled_attention_backward)
