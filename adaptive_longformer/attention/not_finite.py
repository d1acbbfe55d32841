"""Numbers that are not finite: a row that reads one is NaN, and no other row is.

Backends compute whole tiles, in which 0 * NaN is NaN: what reaches rows that read no such number
would depend on the backend. So these numbers are taken out, and the rows that read them found by
attention to marks in their places.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from adaptive_longformer.attention.call import AttentionCall, GlobalProjections
from adaptive_longformer.attention.padding import may_look

_MOST_READ = 2**20
Run = Callable[[AttentionCall], tuple[torch.Tensor, torch.Tensor | None]]


def is_finite(call: AttentionCall, output: torch.Tensor) -> bool:
    """Whether a call has no such number; True also where looking would wait for a device.

    Of long inputs the output is looked at, which takes a quarter of the time. It shows all but an
    infinity that every score turns into a weight of 0.
    """
    if not may_look(output):
        return True
    tensors = [output]
    if output.numel() <= _MOST_READ:
        qkv = call.global_qkv or ()
        more = qkv[:1] if isinstance(qkv, GlobalProjections) else qkv
        tensors += [call.query, call.key, call.value, *more]
    return all(math.isfinite(tensor.detach().sum(dtype=torch.float32).item()) for tensor in tensors)


def rows_of_nan(
    call: AttentionCall, run: Run, mark: Run
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Output and log-sum-exp of a call.

    Args:
        call: whose tensors hold numbers that are not finite.
        run: the backend.
        mark: a backend that takes every call and gives a log-sum-exp.
    """
    clean, bad_rows, bad_key, bad_global = _without(call)
    output, lse = run(clean)
    if not (bad_rows.any() or bad_key.any() or bad_global.any()):
        return output, lse
    with torch.no_grad():
        # Every key that is read has the same weight.
        zeros = torch.zeros_like(call.query, dtype=torch.float32)
        marks = [bad[..., None].expand_as(zeros).float() for bad in (bad_key, bad_global)]
        bias = call.entry_bias
        marked, sums = mark(
            replace(
                call, query=zeros, key=zeros, value=marks[0], dropout_p=0.0, dropout_seed=None,
                global_qkv=None if call.global_qkv is None else (zeros, zeros, marks[1]),
                entry_bias=None if bias is None else bias.masked_fill(bias != -torch.inf, 0.0),
            )
        )  # fmt: skip
        assert sums is not None
        is_nan = (marked[..., 0] > 0) | (bad_rows & (sums != -torch.inf))
        nan = torch.zeros_like(sums).masked_fill_(is_nan, torch.nan)
    return output + nan[..., None].to(output.dtype), None if lse is None else lse + nan


def _without(
    call: AttentionCall,
) -> tuple[AttentionCall, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The call with zeros in place of tokens that are not finite, and which these were: rows,
    keys or values, and those that only global queries read; bool [batch, heads, length].
    """

    def bad(tensor: torch.Tensor) -> torch.Tensor:
        found = ~tensor.detach().isfinite().all(dim=-1)
        if call.attention_mask is None:
            return found
        return found & (call.attention_mask if found.ndim == 2 else call.attention_mask[:, None])

    # Padding is no key, but its own row is computed like any other.
    bad_query = bad_rows = ~call.query.detach().isfinite().all(dim=-1)
    bad_key = bad(call.key) | bad(call.value)
    bad_global, qkv = torch.zeros_like(bad_key), call.global_qkv
    if qkv is not None:
        assert call.global_mask is not None
        if isinstance(qkv, GlobalProjections):
            states = qkv.hidden_states
            bad_global_rows = bad_global = bad(states)[:, None].expand_as(bad_key)
            qkv = qkv._replace(hidden_states=states.masked_fill(bad(states)[..., None], 0.0))
        else:
            bad_global_rows, bad_global = bad(qkv[0]), bad(qkv[1]) | bad(qkv[2])
            qkv = (
                qkv[0].masked_fill(bad_global_rows[..., None], 0.0),
                qkv[1].masked_fill(bad_global[..., None], 0.0),
                qkv[2].masked_fill(bad_global[..., None], 0.0),
            )
        bad_rows = torch.where(call.global_mask[:, None], bad_global_rows, bad_query)
    clean = replace(
        call,
        query=call.query.masked_fill(bad_query[..., None], 0.0),
        key=call.key.masked_fill(bad_key[..., None], 0.0),
        value=call.value.masked_fill(bad_key[..., None], 0.0),
        global_qkv=qkv,
    )
    return clean, bad_rows, bad_key, bad_global
