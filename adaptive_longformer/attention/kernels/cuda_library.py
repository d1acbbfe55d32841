"""The CUDA kernels in the two forms that a machine can have: a library that nvcc built, or programs
that NVRTC compiles when they are first launched.
"""

import ctypes
import json
import logging
from collections.abc import Iterable
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

import torch

from adaptive_longformer.attention.kernels.cache import find_or_make
from adaptive_longformer.attention.kernels.cuda_driver import CudaDriver
from adaptive_longformer.attention.kernels.cuda_launches import (
    INSTANCES,
    KERNELS,
    Instance,
    Launch,
    instance_of,
    shared_memory_bytes,
)
from adaptive_longformer.attention.kernels.nvrtc import OPTIONS, CompiledProgram, Nvrtc

logger = logging.getLogger(__name__)

# Its last line is a variable whose size says what the kernels take as the size of their arguments.
SOURCE = """#include "forward.cuh"
#include "backward.cuh"
__device__ char arguments_size[sizeof(adaptive::Arguments)];
"""
_SIZE = "&arguments_size"


class CudaLibrary:
    """Launches kernels through the C interface of csrc/cuda/launch.cu.

    Args:
        library: the loaded library.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.adaptive_cuda_error.restype = ctypes.c_char_p

    def launch(self, launch: Launch, arguments: Any, device: int, stream: int) -> None:
        """Launches a kernel; the device is the current one.

        Raises:
            RuntimeError: with the kernel and what CUDA says.
        """
        assert self.library.adaptive_cuda_arguments_size() == ctypes.sizeof(arguments)
        error = self.library.adaptive_cuda_launch(
            ctypes.byref(launch), ctypes.byref(arguments), ctypes.c_void_p(stream)
        )
        if error != 0:
            text = self.library.adaptive_cuda_error(error).decode()
            raise RuntimeError(f"the CUDA kernel {launch.name} failed: {text}")


class CudaProgram:
    """Launches kernels that NVRTC compiled, kept on disk from the first time on.

    Args:
        nvrtc: the compiler.
        driver: of the GPUs.
        sources: folder of the kernels' headers.
        cache: folder of all builds.
    """

    def __init__(self, nvrtc: Nvrtc, driver: CudaDriver, sources: Path, cache: Path) -> None:
        self.nvrtc, self._driver = nvrtc, driver
        self._headers = {path.name: path.read_text() for path in sorted(sources.glob("*.cuh"))}
        parts = (SOURCE, self._headers, OPTIONS, KERNELS, nvrtc.version)
        self.folder = cache / f"nvrtc-{sha256(repr(parts).encode()).hexdigest()[:20]}"
        self._functions: dict[tuple[int, Instance], dict[str, Any]] = {}

    def launch(self, launch: Launch, arguments: Any, device: int, stream: int) -> None:
        """Launches a kernel on the current device, whose index is `device`.

        Raises:
            KernelsUnavailableError: the kernel cannot be compiled.
            RuntimeError: it cannot be loaded or launched.
        """
        if launch.is_empty:
            return
        self._driver.ensure_context(device)
        at = (device, instance_of(arguments))
        if at not in self._functions:
            self._functions[at] = self._load(at[1], device, ctypes.sizeof(arguments))
        self._driver.launch(self._functions[at][launch.name], launch, arguments, stream)

    def build(
        self, architectures: Iterable[str], instances: Iterable[Instance] = INSTANCES
    ) -> None:
        """Compiles what is not in the cache yet.

        Raises:
            KernelsUnavailableError: an instance cannot be compiled.
        """
        for architecture, instance in product(architectures, instances):
            self._compiled(instance, architecture)

    def folders(self, architectures: Iterable[str]) -> list[Path]:
        """Where the machine code of every instance lies or will lie, for each architecture."""
        return [self._folder(*pair) for pair in product(INSTANCES, architectures)]

    def _folder(self, instance: Instance, architecture: str) -> Path:
        return self.folder / "-".join(map(str, (architecture, *instance)))

    def _load(self, instance: Instance, device: int, arguments_size: int) -> dict[str, Any]:
        """The kernels of an instance on the current device, by name."""
        program = self._compiled(instance, architecture_of(device))
        module = self._driver.load(program.cubin)
        assert self._driver.size_of(module, program.names[_SIZE]) == arguments_size
        shared_memory = shared_memory_bytes(instance.head_dim, instance.query_block_size)
        return {
            kernel: self._driver.function(
                module, program.names[instance.expression(kernel)], shared_memory[kernel]
            )
            for kernel in KERNELS
        }

    def _compiled(self, instance: Instance, architecture: str) -> CompiledProgram:
        """The machine code of an instance, from the cache or compiled into it."""

        def make(folder: Path) -> str:
            logger.info("Compiling %s for %s with NVRTC (once)", instance, architecture)
            program = compile_instance(self.nvrtc, self._headers, instance, architecture)
            names = json.dumps(program.names).encode()
            (folder / "program").write_bytes(names + b"\n" + program.cubin)
            return "program"

        with find_or_make(self._folder(instance, architecture), make).file as file:
            names = json.loads(file.readline())
            return CompiledProgram(file.read(), names)


def compile_instance(
    nvrtc: Nvrtc, headers: dict[str, str], instance: Instance, architecture: str
) -> CompiledProgram:
    """The machine code of all kernels of an instance.

    Raises:
        KernelsUnavailableError: NVRTC refuses them, with its first error.
    """
    expressions = [instance.expression(kernel) for kernel in KERNELS]
    return nvrtc.compile(SOURCE, headers, [*expressions, _SIZE], architecture)


def architecture_of(device: int) -> str:
    """What NVRTC calls a visible GPU."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def visible_architectures() -> list[str]:
    """Those of the visible GPUs, each once."""
    return sorted({architecture_of(device) for device in range(torch.cuda.device_count())})
