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
from typing import Any, BinaryIO

import torch

from adaptive_longformer.attention.kernels import build
from adaptive_longformer.attention.kernels.cache import (
    KernelsUnavailableError,
    find_or_make,
    kernels_mode,
    named_os_errors,
    why_not_cached,
)

logger = logging.getLogger(__name__)

# By kind: the library, or why there is none.
loaded: dict[str, ctypes.CDLL | str] = {}
_loading = threading.Lock()
_answers: list[Any] = []
_files: list[BinaryIO] = []


def kernel_library(kind: str) -> ctypes.CDLL:
    """The library of a kind, built now if need be; the outcome is kept for the process.

    Args:
        kind: "cpu" or "cuda".

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


def library_place(kind: str) -> Path:
    """The folder of the cache where the library of a kind is, or where a build would put it:
    nothing is compiled or loaded.

    Args:
        kind: "cpu" or "cuda".

    Raises:
        KernelsUnavailableError: it is not there and cannot be built, with the reason.
    """
    known, mode = loaded.get(kind), kernels_mode()
    if isinstance(known, str):
        raise KernelsUnavailableError(known)
    if sys.platform == "win32":
        raise KernelsUnavailableError("they are not made for Windows")
    if kind == "cuda" and torch.version.cuda is None:
        raise KernelsUnavailableError("this torch is built without CUDA")
    with named_os_errors():
        folder = build.library_folder(kind)
        missing = why_not_cached(folder)
    if missing is not None:
        if mode == "cached":
            raise KernelsUnavailableError(f"ADAPTIVE_LONGFORMER_KERNELS is 'cached' and {missing}")
        build.check_compilers(kind)
    return folder


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


def _load(kind: str) -> ctypes.CDLL:
    folder = library_place(kind)
    found = find_or_make(folder, functools.partial(build.build_library, kind))
    # The very file that was checked, whatever has its name now. It stays open, since the system's
    # loader takes what has the name of a library that is loaded for that library.
    _files.append(found.file)
    opened = f"/proc/self/fd/{found.file.fileno()}"
    try:
        return ctypes.CDLL(opened if os.path.exists(opened) else str(found.path))
    except OSError as error:
        raise KernelsUnavailableError(f"{error}; deleting {folder} builds it anew") from error
