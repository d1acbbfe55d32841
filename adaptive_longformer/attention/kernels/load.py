"""Loads the compiled kernels at their first use, once per process: built if need be, with a reason
where that fails.

Environment variables:
    ADAPTIVE_LONGFORMER_KERNELS: "off" uses no compiled kernel, "cached" only what is built already;
        "on" is the default.
    ADAPTIVE_LONGFORMER_CACHE: folder of the builds; ~/.cache/adaptive_longformer if not set.
    ADAPTIVE_LONGFORMER_VERBOSE: "1" prints the commands and the output of the compilers.
    ADAPTIVE_LONGFORMER_BACKEND: the backend that "auto" stands for, which then runs or raises.
"""

import ctypes
import functools
import logging
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from adaptive_longformer.attention.kernels import build, nvrtc
from adaptive_longformer.attention.kernels.cache import (
    KernelsUnavailableError,
    cache_folder,
    find_or_make,
    kernels_mode,
    named_os_errors,
    why_not_cached,
)
from adaptive_longformer.attention.kernels.cuda_driver import CudaDriver
from adaptive_longformer.attention.kernels.cuda_library import (
    CudaLibrary,
    CudaProgram,
    visible_architectures,
)

logger = logging.getLogger(__name__)

ENVIRONMENT = (
    "ADAPTIVE_LONGFORMER_KERNELS",
    "ADAPTIVE_LONGFORMER_CACHE",
    "ADAPTIVE_LONGFORMER_VERBOSE",
    "ADAPTIVE_LONGFORMER_BACKEND",
)
# By kind: the kernels, or why there are none.
loaded: dict[str, Any] = {}
_loading = threading.Lock()
_answers: list[Any] = []
_files: list[BinaryIO] = []


class KernelRoute(NamedTuple):
    """Where the machine code of the kernels of a kind comes from.

    Attributes:
        compiler: "nvcc", "NVRTC" or the C++ compiler.
        folder: of the cache, where the machine code is or will be.
        parts: the folders of its files. A library is one; NVRTC makes one of each instance for each
            kind of visible GPU.
    """

    compiler: str
    folder: Path
    parts: list[Path]

    def count_built(self) -> int:
        """How many of the parts the cache holds."""
        return sum(why_not_cached(folder) is None for folder in self.parts)


def kernel_library(kind: str) -> Any:
    """The kernels of a kind, built now if need be; the outcome is kept for the process.

    Args:
        kind: "cpu" gives the loaded library, "cuda" a `CudaLibrary` or a `CudaProgram`.

    Raises:
        KernelsUnavailableError: with the reason, which is also logged once.
    """
    with _loading:
        if kind not in loaded:
            try:
                loaded[kind] = _load(kind)
            except KernelsUnavailableError as error:
                loaded[kind] = str(error)
                logger.warning("The compiled %s kernels are not used: %s", kind, error)
    result = loaded[kind]
    if isinstance(result, str):
        raise KernelsUnavailableError(result)
    return result


def why_unavailable(kind: str) -> str | None:
    """None if the kernels of a kind can be used, else the reason. Builds them if need be."""
    try:
        kernel_library(kind)
    except KernelsUnavailableError as error:
        return str(error)
    return None


def kernel_route(kind: str) -> KernelRoute:
    """How this process gets the kernels of a kind, or would: nothing is compiled or loaded.

    Args:
        kind: "cpu" or "cuda".

    Raises:
        KernelsUnavailableError: it cannot get them, with the reason.
    """
    program = _planned_program(kind)
    if program is None:
        folder = build.library_folder(kind)
        return KernelRoute("nvcc" if kind == "cuda" else build.cpp_compiler(), folder, [folder])
    architectures = visible_architectures()
    if not architectures:
        raise KernelsUnavailableError("no GPU is visible for which NVRTC could compile")
    return KernelRoute("NVRTC", program.folder, program.folders(architectures))


def forget() -> None:
    """Forgets what was loaded or failed and what was found out about it, so that the next use tries
    again.
    """
    with _loading:
        loaded.clear()
    for answers in _answers:
        answers.cache_clear()


def until_forgotten(function: Callable[..., str | None]) -> Callable[..., str | None]:
    """Keeps the answers of a function that asks whether kernels are usable, until `forget`."""
    kept = functools.lru_cache(maxsize=None)(function)
    _answers.append(kept)
    return kept


def _load(kind: str) -> Any:
    program = _planned_program(kind)
    if program is not None:
        return program
    if kind != "cuda":
        return _load_library(kind)
    try:
        return CudaLibrary(_load_library(kind))
    except KernelsUnavailableError as error:
        return _program_instead(error)


def _planned_program(kind: str) -> CudaProgram | None:
    """What stands in for the library of a kind; None if there is one or a compiler can build it.

    Raises:
        KernelsUnavailableError: the kernels cannot be had in any way, with the reasons.
    """
    known = loaded.get(kind)
    if isinstance(known, str):
        raise KernelsUnavailableError(known)
    if known is not None:
        return known if isinstance(known, CudaProgram) else None
    mode = kernels_mode()
    if sys.platform == "win32":
        raise KernelsUnavailableError("they are not made for Windows")
    if kind == "cuda" and torch.version.cuda is None:
        raise KernelsUnavailableError("this torch is built without CUDA")
    with named_os_errors():
        missing = why_not_cached(build.library_folder(kind))
    if missing is None:
        return None
    try:
        if mode == "cached":
            raise KernelsUnavailableError(f"ADAPTIVE_LONGFORMER_KERNELS is 'cached' and {missing}")
        build.check_compilers(kind)
    except KernelsUnavailableError as error:
        if kind != "cuda":
            raise
        return _program_instead(error)
    return None


def _program_instead(error: KernelsUnavailableError) -> CudaProgram:
    """What NVRTC offers where nvcc cannot be used; nothing is compiled yet.

    Raises:
        KernelsUnavailableError: it offers nothing; both reasons.
    """
    try:
        compiler = nvrtc.find_nvrtc(torch.version.cuda)
        program = CudaProgram(compiler, CudaDriver(), build.SOURCES / "cuda", cache_folder())
    except KernelsUnavailableError as other:
        raise KernelsUnavailableError(f"{error}; {other}") from error
    logger.info("NVRTC compiles the CUDA kernels, since nvcc does not: %s", error)
    return program


def _load_library(kind: str) -> ctypes.CDLL:
    with named_os_errors():
        folder = build.library_folder(kind)
    found = find_or_make(folder, functools.partial(build.build_library, kind))
    # The very file that was checked, whatever has its name now. It stays open, since the system's
    # loader takes what has the name of a library that is loaded for that library.
    _files.append(found.file)
    opened = f"/proc/self/fd/{found.file.fileno()}"
    try:
        return ctypes.CDLL(opened if os.path.exists(opened) else str(found.path))
    except OSError as error:
        raise KernelsUnavailableError(f"{error}; deleting {folder} builds it anew") from error
