"""By which compiler the kernels come to this machine, and how much of them the cache holds."""

from pathlib import Path
from typing import NamedTuple

from adaptive_longformer.attention.backends.cuda import INSTANCES
from adaptive_longformer.attention.kernels.cache import (
    ExtensionUnavailableError,
    named_os_errors,
    refuse_unsafe_folder,
)
from adaptive_longformer.attention.kernels.cuda_program import visible_architectures
from adaptive_longformer.attention.kernels.load import (
    build_folder,
    cpp_compiler,
    is_built,
    planned_program,
)


class KernelRoute(NamedTuple):
    """Where the machine code of the kernels of a kind comes from.

    Attributes:
        compiler: "nvcc", "NVRTC" or the C++ compiler.
        folder: of the cache, where the machine code is or will be.
        num_built, num_programs: what the folder holds of what belongs there. A library is one
            program; NVRTC makes one of each instance for each kind of visible GPU.
    """

    compiler: str
    folder: Path
    num_built: int
    num_programs: int

    @property
    def is_built(self) -> bool:
        return self.num_built == self.num_programs


def kernel_route(kind: str) -> KernelRoute:
    """How this process gets the kernels of a kind, or would: nothing is compiled or loaded.

    Args:
        kind: "cpu" or "cuda".

    Raises:
        ExtensionUnavailableError: it cannot get them, with the reason.
    """
    with named_os_errors():
        program = planned_program(kind)
        if program is None:
            compiler = "nvcc" if kind == "cuda" else cpp_compiler()
            route = KernelRoute(compiler, build_folder(kind), int(is_built(kind)), 1)
        else:
            architectures = visible_architectures()
            if not architectures:
                raise ExtensionUnavailableError("no GPU is visible for which NVRTC could compile")
            num_built = program.count_built(INSTANCES, architectures)
            num_programs = len(INSTANCES) * len(architectures)
            route = KernelRoute("NVRTC", program.folder, num_built, num_programs)
        if route.folder.exists():
            refuse_unsafe_folder(route.folder)
    return route
