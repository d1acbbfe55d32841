"""The CUDA kernels without nvcc: NVRTC compiles an instance when it is first launched, the driver
loads and launches it.
"""

import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from adaptive_longformer.attention.kernels.cache import (
    ExtensionUnavailableError,
    kernels_mode,
    locked,
    named_os_errors,
    refuse_unsafe_folder,
)
from adaptive_longformer.attention.kernels.cuda_driver import CudaDriver
from adaptive_longformer.attention.kernels.cuda_launches import (
    KERNELS,
    Instance,
    Launch,
    instance_of,
    shared_memory_bytes,
)
from adaptive_longformer.attention.kernels.nvrtc import OPTIONS, CompiledProgram, Nvrtc

logger = logging.getLogger(__name__)

SOURCE = '#include "forward.cuh"\n#include "backward.cuh"\n'


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
        digest = hashlib.sha256(
            repr((SOURCE, self._headers, OPTIONS, KERNELS, nvrtc.version)).encode()
        )
        self.folder = cache / f"nvrtc-{digest.hexdigest()[:20]}"
        self._functions: dict[tuple[int, Instance], dict[str, Any]] = {}

    def launch(self, launch: Launch, arguments: Any, device: int, stream: int) -> None:
        """Launches a kernel on the current device, whose index is `device`.

        Raises:
            ExtensionUnavailableError: the kernel cannot be compiled.
            RuntimeError: it cannot be loaded or launched.
        """
        if launch.is_empty:
            return
        at = (device, instance_of(arguments))
        if at not in self._functions:
            self._functions[at] = self._load(at[1], architecture_of(device))
        self._driver.launch(self._functions[at][launch.name], launch, arguments, stream)

    def build(self, instances: Iterable[Instance], architectures: Iterable[str]) -> None:
        """Compiles what is not in the cache yet.

        Raises:
            ExtensionUnavailableError: an instance cannot be compiled.
        """
        instances = list(instances)
        for architecture in architectures:
            for instance in instances:
                self._compiled(instance, architecture)

    def count_built(self, instances: Iterable[Instance], architectures: Iterable[str]) -> int:
        """How many of the instances the cache holds, counted for each architecture."""
        pairs = itertools.product(instances, architectures)
        return sum(all(path.exists() for path in self._paths(*pair)) for pair in pairs)

    def _paths(self, instance: Instance, architecture: str) -> tuple[Path, Path]:
        """Where the machine code of an instance lies, and the names of its kernels."""
        stem = "-".join(map(str, (architecture, *instance)))
        return self.folder / f"{stem}.cubin", self.folder / f"{stem}.json"

    def _load(self, instance: Instance, architecture: str) -> dict[str, Any]:
        """The kernels of an instance on the current device, by name."""
        program = self._compiled(instance, architecture)
        module = self._driver.load(program.cubin)
        shared_memory = shared_memory_bytes(instance.head_dim, instance.query_block_size)
        return {
            kernel: self._driver.function(
                module, program.names[instance.expression(kernel)], shared_memory[kernel]
            )
            for kernel in KERNELS
        }

    def _compiled(self, instance: Instance, architecture: str) -> CompiledProgram:
        """The machine code of an instance, from the cache or compiled into it."""
        code, names = self._paths(instance, architecture)
        with named_os_errors():
            if not (code.exists() and names.exists()):
                if kernels_mode() == "cached":
                    raise ExtensionUnavailableError(
                        f"ADAPTIVE_LONGFORMER_KERNELS is 'cached' and {code} does not exist"
                    )
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                refuse_unsafe_folder(self.folder)
                with locked(self.folder):
                    # Another process may have compiled while this one waited.
                    if not (code.exists() and names.exists()):
                        self._compile(instance, architecture, code, names)
            refuse_unsafe_folder(self.folder)
            return CompiledProgram(code.read_bytes(), json.loads(names.read_text()))

    def _compile(self, instance: Instance, architecture: str, code: Path, names: Path) -> None:
        logger.info("Compiling %s for %s with NVRTC (a few seconds, once)", instance, architecture)
        expressions = [instance.expression(kernel) for kernel in KERNELS]
        program = self.nvrtc.compile(SOURCE, self._headers, expressions, architecture)
        code.write_bytes(program.cubin)
        # The names appear last and whole: they say that the code is complete.
        unfinished = names.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(program.names))
        os.replace(unfinished, names)


def architecture_of(device: int) -> str:
    """What NVRTC calls a visible GPU."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def visible_architectures() -> list[str]:
    """Those of the visible GPUs, each once."""
    return sorted({architecture_of(device) for device in range(torch.cuda.device_count())})
