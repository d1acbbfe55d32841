"""The command `adaptive-longformer build-kernels`: compiles before the first use, as before a
launch of many processes.
"""

import argparse
import time

import torch

from adaptive_longformer.attention.kernels.cache import KernelsUnavailableError
from adaptive_longformer.attention.kernels.cuda_library import CudaProgram, visible_architectures
from adaptive_longformer.attention.kernels.load import kernel_library, kernel_route

KINDS = ("cpu", "cuda")


def run(args: argparse.Namespace) -> int:
    """Build each kind and say where it is, or why it could not be built.

    Returns:
        0, or 1 if a kind could not be built.

    Raises:
        ValueError: there is no such kind.
    """
    for kind in args.kinds:
        if kind not in KINDS:
            raise ValueError(f"KIND is {kind!r}, allowed are {', '.join(KINDS)}")
    kinds = args.kinds or (KINDS if torch.cuda.is_available() else KINDS[:1])
    failed = False
    for kind in kinds:
        try:
            print(f"{kind}: {_build(kind)}")
        except KernelsUnavailableError as error:
            print(f"{kind}: not built: {error}")
            failed = True
    return int(failed)


def _build(kind: str) -> str:
    """Builds what is not in the cache yet; where it is, and by which compiler it got there.

    Raises:
        KernelsUnavailableError: with the reason.
    """
    planned, started = kernel_route(kind), time.monotonic()
    was_built = planned.count_built() == len(planned.parts)
    if not was_built:
        print(f"{kind}: {planned.compiler} compiles (up to some minutes)", flush=True)
    kernels = kernel_library(kind)
    if isinstance(kernels, CudaProgram):
        kernels.build(visible_architectures())
    # NVRTC has taken over if nvcc failed.
    taken = kernel_route(kind)
    if was_built and taken.compiler == planned.compiler:
        return f"already in {taken.folder} (by {taken.compiler})"
    seconds = time.monotonic() - started
    return f"built by {taken.compiler} in {seconds:.0f} s in {taken.folder}"
