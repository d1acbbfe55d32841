"""The command `adaptive-longformer build-kernels`: compiles before the first use, as before a
launch of many processes.
"""

import argparse
import time

import torch

from adaptive_longformer.attention.compiled_cuda import INSTANCES
from adaptive_longformer.attention.cuda_program import CudaProgram, architecture_of
from adaptive_longformer.attention.extension import (
    build_folder,
    is_built,
    kernel_library,
    why_unavailable,
)
from adaptive_longformer.attention.kernel_cache import ExtensionUnavailableError

KINDS = ("cpu", "cuda")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `build-kernels` and its arguments."""
    parser = subparsers.add_parser(
        "build-kernels",
        help="compile the attention kernels now instead of at their first use",
        description=(
            "Compile the attention kernels into the cache, for this machine's processor and GPUs. "
            "Without it they are compiled at their first use."
        ),
    )
    parser.add_argument(
        "kinds",
        nargs="*",
        metavar="KIND",
        help="cpu, cuda (default: cpu, and cuda where torch sees a GPU)",
    )


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
        was_built, started = is_built(kind), time.monotonic()
        if not was_built:
            print(f"{kind}: compiling (up to some minutes)", flush=True)
        reason = why_unavailable(kind)
        if reason is not None:
            print(f"{kind}: not built: {reason}")
            failed = True
            continue
        kernels, folder = kernel_library(kind), build_folder(kind)
        if isinstance(kernels, CudaProgram):
            folder = kernels.folder
            try:
                kernels.build(INSTANCES, map(architecture_of, range(torch.cuda.device_count())))
            except ExtensionUnavailableError as error:
                print(f"{kind}: not built: {error}")
                failed = True
                continue
        if was_built:
            print(f"{kind}: already in {folder}")
        else:
            print(f"{kind}: built in {time.monotonic() - started:.0f} s in {folder}")
    return int(failed)
