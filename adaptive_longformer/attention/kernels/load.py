"""Builds the compiled kernels at their first use and loads them: cached on disk, locked, with a
reason where it fails.

Environment variables:
    ADAPTIVE_LONGFORMER_KERNELS: "off" uses no compiled kernel, "cached" only what is built already;
        "on" is the default.
    ADAPTIVE_LONGFORMER_CACHE: folder of the builds; ~/.cache/adaptive_longformer if not set.
    ADAPTIVE_LONGFORMER_VERBOSE: "1" shows the compiler's output.
    ADAPTIVE_LONGFORMER_BACKEND: the backend that "auto" stands for, which then runs or raises.
"""

import contextlib
import ctypes
import functools
import hashlib
import itertools
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from adaptive_longformer.attention.kernels.cache import (
    ExtensionUnavailableError,
    cache_folder,
    kernels_mode,
    locked,
    named_os_errors,
    refuse_unsafe_folder,
)
from adaptive_longformer.attention.kernels.cuda_driver import CudaDriver
from adaptive_longformer.attention.kernels.cuda_library import CudaLibrary
from adaptive_longformer.attention.kernels.cuda_program import CudaProgram
from adaptive_longformer.attention.kernels.nvrtc import find_nvrtc

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parents[2] / "csrc"
ENVIRONMENT = (
    "ADAPTIVE_LONGFORMER_KERNELS",
    "ADAPTIVE_LONGFORMER_CACHE",
    "ADAPTIVE_LONGFORMER_VERBOSE",
    "ADAPTIVE_LONGFORMER_BACKEND",
)
# Written last; holds the file name of the library.
_DONE = "done"
_attempts = itertools.count()
_PATTERNS = {"cpu": "*.cpp", "cuda": "*.cu"}
_CUDA_FLAGS = ["-O3", "-std=c++17"]
_loading = threading.Lock()
_loaded: dict[str, Any] = {}
_answers: list[Any] = []


def kernel_library(kind: str) -> Any:
    """The kernels of a kind, built now if need be; the outcome is kept for the process.

    Args:
        kind: "cpu" gives the loaded library, "cuda" a `CudaLibrary` or a `CudaProgram`.

    Raises:
        ExtensionUnavailableError: with the reason, which is also logged once.
    """
    with _loading:
        if kind not in _loaded:
            try:
                _loaded[kind] = _load(kind)
            except ExtensionUnavailableError as error:
                _loaded[kind] = str(error)
                logger.warning("The compiled %s kernels are not used: %s", kind, error)
    result = _loaded[kind]
    if isinstance(result, str):
        raise ExtensionUnavailableError(result)
    return result


def why_unavailable(kind: str) -> str | None:
    """None if the kernels of a kind can be used, else the reason. Builds them if need be."""
    try:
        kernel_library(kind)
    except ExtensionUnavailableError as error:
        return str(error)
    return None


def is_built(kind: str) -> bool:
    """Whether the cache holds a finished build for this machine."""
    return (build_folder(kind) / _DONE).exists()


def forget() -> None:
    """Forgets what was loaded or failed and what was found out about it, so that the next use tries
    again.
    """
    with _loading:
        _loaded.clear()
    for answers in _answers:
        answers.cache_clear()


def until_forgotten(function: Callable[..., str | None]) -> Callable[..., str | None]:
    """Keeps the answers of a function that asks whether kernels are usable, until `forget`."""
    kept = functools.lru_cache(maxsize=None)(function)
    _answers.append(kept)
    return kept


def _load(kind: str) -> Any:
    program = planned_program(kind)
    if program is not None:
        return program
    if kind != "cuda":
        return _load_built(kind)
    try:
        return CudaLibrary(_load_built(kind))
    except ExtensionUnavailableError as error:
        return _program_instead(error)


def planned_program(kind: str) -> CudaProgram | None:
    """What stands in for the library of a kind; None if there is one or a compiler can build it.

    Nothing is built or loaded.

    Raises:
        ExtensionUnavailableError: the kernels cannot be had in any way, with the reasons.
    """
    known = _loaded.get(kind)
    if isinstance(known, str):
        raise ExtensionUnavailableError(known)
    if known is not None:
        return known if isinstance(known, CudaProgram) else None
    mode = kernels_mode()
    if kind == "cuda" and torch.version.cuda is None:
        raise ExtensionUnavailableError("this torch is built without CUDA")
    with named_os_errors():
        if is_built(kind):
            return None
    try:
        if mode == "cached":
            raise ExtensionUnavailableError(
                "ADAPTIVE_LONGFORMER_KERNELS is 'cached' and "
                f"{build_folder(kind)} holds no finished build"
            )
        _check_compilers(kind)
    except ExtensionUnavailableError as error:
        if kind != "cuda":
            raise
        return _program_instead(error)
    return None


def _program_instead(error: ExtensionUnavailableError) -> CudaProgram:
    """What NVRTC offers where nvcc cannot be used.

    Raises:
        ExtensionUnavailableError: it offers nothing; both reasons.
    """
    try:
        program = cuda_program()
    except ExtensionUnavailableError as other:
        raise ExtensionUnavailableError(f"{error}; {other}") from error
    logger.info("NVRTC compiles the CUDA kernels, since nvcc does not: %s", error)
    return program


def cuda_program() -> CudaProgram:
    """The CUDA kernels for a machine without nvcc; nothing is compiled yet.

    Raises:
        ExtensionUnavailableError: there is no NVRTC of torch's version of CUDA, or no driver.
    """
    return CudaProgram(
        find_nvrtc(torch.version.cuda), CudaDriver(), SOURCES / "cuda", cache_folder()
    )


def _load_built(kind: str) -> ctypes.CDLL:
    folder = build_folder(kind)
    with named_os_errors():
        if not is_built(kind):
            folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            refuse_unsafe_folder(folder.parent)
            with locked(folder):
                # Another process may have built while this one waited.
                if not is_built(kind):
                    _build(kind, folder)
        refuse_unsafe_folder(folder)
        library = folder / (folder / _DONE).read_text()
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise ExtensionUnavailableError(f"{error}; deleting {folder} builds it anew") from error


def build_folder(kind: str) -> Path:
    """Where the build for this source, torch, Python and processor belongs."""
    digest = hashlib.sha256()
    for path in sorted((SOURCES / kind).iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    parts = (
        *(_CUDA_FLAGS if kind == "cuda" else _compile_flags()),
        *_device_capabilities(kind),
        torch.__version__,
        sys.version,
        platform.platform(),
        platform.machine(),
        _processor(),
    )
    digest.update("\0".join(parts).encode())
    return cache_folder() / f"{kind}-{digest.hexdigest()[:20]}"


def _compile_flags() -> list[str]:
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    return ["-O3", "-std=c++17", native, "-ffp-contract=fast"]


def _device_capabilities(kind: str) -> list[str]:
    """What cpp_extension builds for: the listed architectures, or those of the visible GPUs."""
    if kind != "cuda":
        return []
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if listed:
        return [listed]
    count = torch.cuda.device_count()
    return sorted({str(torch.cuda.get_device_capability(index)) for index in range(count)})


def cpp_compiler() -> str:
    """The command that compiles C++."""
    return os.environ.get("CXX", "c++")


def _check_compilers(kind: str) -> None:
    """Raises unless what a build needs is there; cpp_extension would find out late, or not."""
    compiler = cpp_compiler()
    if shutil.which(compiler.partition(" ")[0]) is None:
        missing = compiler or "an empty CXX"
        raise ExtensionUnavailableError(f"no C++ compiler: {missing} was not found")
    if shutil.which("ninja", path=_search_path()) is None:
        raise ExtensionUnavailableError("ninja is not installed")
    if kind == "cuda":
        # Imported here: it is slow, and needed only where nothing is built yet.
        from torch.utils import cpp_extension

        _check_cuda_compiler(cpp_extension.CUDA_HOME)
        if torch.cuda.device_count() == 0 and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
            raise ExtensionUnavailableError("no GPU is visible for which nvcc could compile")


def _check_cuda_compiler(cuda_home: str | None) -> None:
    """Raises unless there is an nvcc that fits torch."""
    assert torch.version.cuda is not None
    if cuda_home is None:
        raise ExtensionUnavailableError("no nvcc: CUDA_HOME is not set and nvcc was not found")
    nvcc = Path(cuda_home) / "bin" / "nvcc"
    if not nvcc.exists():
        raise ExtensionUnavailableError(f"no nvcc: {nvcc} does not exist")
    command = [str(nvcc), "--version"]
    version = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    match = re.search(r"release (\d+)\.", version)
    major = torch.version.cuda.split(".")[0]
    if match is None or match[1] != major:
        found = version.strip() or "an unknown version" if match is None else f"CUDA {match[1]}"
        raise ExtensionUnavailableError(f"nvcc is of {found}, torch of CUDA {major}")


def _link_flags(nvcc: Path) -> list[str]:
    """Where nvcc says that its libraries are. What is found as nvcc may be a script that starts one
    elsewhere, and cpp_extension looks only beside the script.
    """
    command = [str(nvcc), "--dryrun", "-x", "cu", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    line = next((line for line in said.splitlines() if line.startswith("#$ LIBRARIES=")), "")
    return re.findall(r'"(-L[^"]+)"', line)


def _processor() -> str:
    """What -march=native depends on: a cache in a shared home serves machines of several kinds."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor()


def _build(kind: str, folder: Path) -> None:
    """Compiles into the folder; the marker goes in last."""
    # What a killed builder left, torch's own lock file among it, would make every later build wait.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    logger.info("Building the compiled %s kernels in %s (some seconds, once)", kind, folder)
    # Imported here: it is slow, and needed only by the process that builds.
    from torch.utils import cpp_extension

    link_flags = []
    if kind == "cuda":
        assert cpp_extension.CUDA_HOME is not None
        link_flags = _link_flags(Path(cpp_extension.CUDA_HOME) / "bin" / "nvcc")
    # cpp_extension builds one name only once per process, so every attempt has its own.
    name = f"adaptive_longformer_{kind}_{next(_attempts)}"
    with _ninja_on_path():
        try:
            cpp_extension.load(
                name,
                [str(path) for path in sorted((SOURCES / kind).glob(_PATTERNS[kind]))],
                extra_cflags=_compile_flags(),
                extra_cuda_cflags=_CUDA_FLAGS,
                extra_ldflags=link_flags,
                build_directory=str(folder),
                is_python_module=False,
                verbose=os.environ.get("ADAPTIVE_LONGFORMER_VERBOSE") == "1",
            )
        except (RuntimeError, subprocess.CalledProcessError) as error:
            lines = str(error).splitlines()
            reason = next((line for line in lines if "error: " in line), lines[0])
            raise ExtensionUnavailableError(f"the build failed: {reason.strip()}") from error
    (folder / _DONE).write_text(f"{name}.so")


def _search_path() -> str:
    """Where programs are looked for: also beside this Python, activated or not."""
    return os.pathsep.join((os.environ.get("PATH", ""), str(Path(sys.executable).parent)))


@contextlib.contextmanager
def _ninja_on_path() -> Iterator[None]:
    """Lets cpp_extension find the ninja of this environment, activated or not."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = _search_path()
    try:
        yield
    finally:
        os.environ["PATH"] = before
