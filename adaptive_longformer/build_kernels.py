"""The command `adaptive-longformer build-kernels`: compiles before the first use, as before a
launch of many processes.
"""

import argparse
import time

import torch

from adaptive_longformer.attention.kernels.build import compiler_of
from adaptive_longformer.attention.kernels.cache import KernelsUnavailableError, why_not_cached
from adaptive_longformer.attention.kernels.load import kernel_library, library_place

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
    folder, compiler, started = library_place(kind), compiler_of(kind), time.monotonic()
    was_built = why_not_cached(folder) is None
    if not was_built:
        print(f"{kind}: {compiler} compiles (up to some minutes)", flush=True)
    kernel_library(kind)
    if was_built:
        return f"already in {folder}"
    return f"built by {compiler} in {time.monotonic() - started:.0f} s in {folder}"
