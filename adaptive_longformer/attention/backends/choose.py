"""The backends of the attention operator, and how "auto" chooses among them."""

import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from adaptive_longformer.attention.backends.blocked import blocked_supports, run_blocked
from adaptive_longformer.attention.backends.compiled import (
    cpp_supports,
    cuda_supports,
    run_compiled,
)
from adaptive_longformer.attention.backends.exportable import (
    exportable_supports,
    run_exportable,
)
from adaptive_longformer.attention.backends.sdpa import run_sdpa, sdpa_supports
from adaptive_longformer.attention.backends.triton import run_triton, triton_supports
from adaptive_longformer.attention.call import AttentionCall
from adaptive_longformer.attention.kernels.load import why_unavailable
from adaptive_longformer.attention.reference import reference_attention

# Longest input for which dense attention with a mask is preferred, by device, with a window of 512
# tokens: measured on a CPU, expected on a GPU.
DENSE_CROSSOVER = {"cpu": 768, "cuda": 2048}

# What "auto" tries before "blocked", by device, in this order.
FUSED = {"cuda": ("cuda", "triton"), "cpu": ("cpp",)}

# What "auto" stands for in this process; read once, so that torch.compile sees a constant.
AUTO = os.environ.get("ADAPTIVE_LONGFORMER_BACKEND", "auto")


class Backend(NamedTuple):
    """A way to compute a call.

    Attributes:
        name: what users write in `backend=` and `config.attention_backend`.
        unsupported: None, or the reason why this backend cannot run the call.
        run: output and log-sum-exp (None if the backend has none).
    """

    name: str
    unsupported: Callable[[AttentionCall], str | None]
    run: Callable[[AttentionCall], tuple[torch.Tensor, torch.Tensor | None]]


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("sdpa", sdpa_supports, run_sdpa),
        Backend("cuda", cuda_supports, run_compiled),
        Backend("triton", triton_supports, run_triton),
        Backend("cpp", cpp_supports, run_compiled),
        Backend("blocked", blocked_supports, run_blocked),
        Backend("exportable", exportable_supports, run_exportable),
        Backend("reference", lambda call: None, reference_attention),
    )
}


def cpp_is_automatic() -> bool:
    """Whether "auto" may mean the C++ kernels on a CPU: they can be used, and nothing else is asked
    for. Builds them if need be.
    """
    return AUTO in ("auto", "cpp") and why_unavailable("cpu") is None


def choose_backend(call: AttentionCall, name: str = "auto") -> Backend:
    """The backend that runs a call; "auto" takes the fastest that can.

    The environment variable ADAPTIVE_LONGFORMER_BACKEND names a backend to take in place of "auto".

    Raises:
        ValueError: the name is unknown, or the named backend cannot run the call (it never falls
            back).
    """
    if name == "auto":
        name = AUTO
    if name == "auto":
        if torch.compiler.is_exporting():
            # The others compare sizes, or are operators that no other program knows.
            for name in ("exportable", "sdpa"):
                if BACKENDS[name].unsupported(call) is None:
                    return BACKENDS[name]
        if (
            call.query.shape[2] <= DENSE_CROSSOVER.get(call.query.device.type, 0)
            and sdpa_supports(call) is None
        ):
            return BACKENDS["sdpa"]
        for fused in FUSED.get(call.query.device.type, ()):
            if BACKENDS[fused].unsupported(call) is None:
                return BACKENDS[fused]
        return BACKENDS["blocked"]
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"backend is {name!r}, one of {['auto', *BACKENDS]} is allowed")
    reason = BACKENDS[name].unsupported(call)
    if reason is not None:
        raise ValueError(f"backend {name!r} cannot run this call: {reason}")
    return BACKENDS[name]
