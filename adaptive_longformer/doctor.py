"""The command `adaptive-longformer doctor`: what each backend can do on this machine, and why
not.
"""

import argparse
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from itertools import takewhile

import torch
import transformers

from adaptive_longformer.attention.backends.choose import FUSED, choose_backend
from adaptive_longformer.attention.call import make_call
from adaptive_longformer.attention.functional import (
    explain_backends,
    sparse_attention,
)
from adaptive_longformer.attention.kernels import cache
from adaptive_longformer.attention.kernels.build import compiler_of, cpp_compiler, find_nvcc
from adaptive_longformer.attention.kernels.load import library_place
from adaptive_longformer.build_kernels import KINDS
from adaptive_longformer.patterns.sliding_window import SlidingWindow

# Enough for several blocks and a last one that is not full.
_LENGTH = 700
_LONG_LENGTH = 4096
_DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16, torch.float32)}


def run(args: argparse.Namespace) -> int:
    """Print the report.

    Returns:
        0, or 1 if a backend that claims to run gives a wrong result.
    """
    for name, value in _environment():
        print(f"{name:<13} {value}")
    failed = False
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for dtype in _DTYPES[device]:
            print(f"\n{str(dtype).removeprefix('torch.')} on {device}")
            for name, verdict, is_wrong in _backends(torch.device(device), dtype):
                print(f"  {name:<12}{verdict}")
                failed |= is_wrong
    return int(failed)


def _environment() -> Iterator[tuple[str, str]]:
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "torch", f"{torch.__version__}, {torch.get_num_threads()} threads"
    yield "transformers", transformers.__version__
    yield "CUDA", torch.version.cuda or "this torch is built without CUDA"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            name = torch.cuda.get_device_name(index)
            yield f"GPU {index}", f"{name}, compute capability {major}.{minor}"
    else:
        yield "GPU", "none that torch can use"
    yield "C++ compiler", _version(cpp_compiler().partition(" ")[0])
    yield "nvcc", _version(str(find_nvcc() or "nvcc"))
    yield "ninja", _version("ninja")
    for kind in KINDS:
        for line in kernels_and_files(kind):
            yield f"{kind} kernels", line
    for name, value in sorted(os.environ.items()):
        if name.startswith("ADAPTIVE_LONGFORMER_"):
            yield name, value


def _version(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        return "not found"
    result = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    lines = [line for line in result.stdout.splitlines() if any(c.isdigit() for c in line)]
    chosen = next((line for line in lines if "release" in line), lines[0] if lines else "?")
    return f"{path}: {chosen.strip()}"


def kernels_and_files(kind: str) -> Iterator[str]:
    """By which compiler the kernels come here and where they are, or why they cannot be had; then
    why the file in the cache is trusted or not.
    """
    try:
        folder = library_place(kind)
        found = cache.find(folder)
        is_built = isinstance(found, cache.CachedFile)
        state = "in the cache" if is_built else "not in the cache yet"
        yield f"by {compiler_of(kind)}, {state} ({folder})"
        if is_built:
            with found.file:
                yield f"trusted: {found.why_trusted()}"
        elif folder.exists():
            yield f"not trusted, built anew at the next use: {found}"
    except cache.KernelsUnavailableError as error:
        yield f"none: {error}"


def _backends(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, str, bool]]:
    """For each backend its name, what it can do, and whether its result is wrong."""
    generator = torch.Generator().manual_seed(0)
    exact = [
        torch.randn(1, 4, _LENGTH, 64, generator=generator, dtype=torch.float64) for _ in range(3)
    ]
    query, key, value = (tensor.to(device, dtype) for tensor in exact)
    pattern = SlidingWindow(128)
    is_global = (torch.arange(_LENGTH) == 0)[None]
    expected = sparse_attention(
        exact[0], exact[1], exact[2], pattern, global_mask=is_global, backend="reference"
    )
    assert isinstance(expected, torch.Tensor)
    where = is_global.to(device)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for name, reason in explain_backends(query, key, value, pattern, global_mask=where).items():
        if reason is not None:
            yield name, f"no: {reason}", False
            continue
        started = time.perf_counter()
        output = sparse_attention(query, key, value, pattern, backend=name, global_mask=where)
        assert isinstance(output, torch.Tensor)
        error = ((output.double().cpu() - expected).norm() / expected.norm()).item()
        seconds = time.perf_counter() - started
        verdict = f"relative error {error:.1e} for {_LENGTH} tokens, {1000 * seconds:.0f} ms"
        if not error < tolerance:
            yield name, f"WRONG: {verdict}, at most {tolerance:.0e} is right", True
        else:
            yield name, f"yes: {verdict}", False
    long = torch.zeros(1, 1, _LONG_LENGTH, 64, device=device, dtype=dtype)
    chosen = choose_backend(make_call(long, long, long, SlidingWindow(256)))
    takes = f"takes {chosen.name} for {_LONG_LENGTH} tokens with a window of 512"
    if unusable := list(takewhile(lambda name: name != chosen.name, FUSED[device.type])):
        takes += f", for want of {' and '.join(unusable)}"
    yield "auto", takes, False
