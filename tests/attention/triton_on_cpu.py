"""Triton without a GPU: kernels are interpreted in a process of their own, or compiled only."""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import multiprocessing
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy
import pytest
import torch

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed; there are wheels for Linux",
)


def skip_without_loops():
    """Skips a test where Triton cannot interpret loops with bounds known at run time."""
    version = "" if needs_triton.args[0] else importlib.metadata.version("triton")
    if version.startswith("3.6.") and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
        pytest.skip("Triton 3.6 cannot interpret loops with NumPy 2.4 (triton#9171)")


@contextlib.contextmanager
def interpreter():
    """Yields a function that calls another one, named by module and name, where Triton interprets.

    Triton asks whether to interpret when it is imported, so another process is needed.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_interpret) as process:

        def call(module, name, *arguments, **options):
            return process.submit(_call, module, name, *arguments, **options).result()

        yield call


def _interpret():
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


def _call(module, name, *arguments, **options):
    return getattr(importlib.import_module(module), name)(*arguments, **options)


class _NoGPU:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_device(self):
        return self.capability  # kernels are kept by device

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


@contextlib.contextmanager
def compile_only(capability):
    """Inside, launches of kernels with tensors on the CPU only compile them.

    Args:
        capability: of the GPU, such as 90.

    Yields:
        A list that they are added to: name of the function, and the compiled kernel.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    compiled = []
    run = JITFunction.run

    def compile(self, *arguments, **options):
        compiled.append((self.fn.__name__, run(self, *arguments, **options | {"warmup": True})))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", compile)
        patch.setattr(driver, "_active", _NoGPU(capability))
        yield compiled


def resources(kernel):
    """What a compiled kernel needs per thread: registers, and bytes of stack, spills among them."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [program, "--dump-resource-usage", file.name]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", printed))
    return int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"])
