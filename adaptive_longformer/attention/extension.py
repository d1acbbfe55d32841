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
import hashlib
import itertools
import logging
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent.parent / "csrc"
ENVIRONMENT = (
    "ADAPTIVE_LONGFORMER_KERNELS",
    "ADAPTIVE_LONGFORMER_CACHE",
    "ADAPTIVE_LONGFORMER_VERBOSE",
    "ADAPTIVE_LONGFORMER_BACKEND",
)
LOCK_TIMEOUT = 600.0
# Written last; holds the file name of the library.
_DONE = "done"
_attempts = itertools.count()
_PATTERNS = {"cpu": "*.cpp", "cuda": "*.cu"}
_CUDA_FLAGS = ["-O3", "-std=c++17"]
_loading = threading.Lock()
_loaded: dict[str, "ctypes.CDLL | str"] = {}


class ExtensionUnavailableError(RuntimeError):
    """The compiled kernels cannot be used here; the message says why."""


def kernel_library(kind: str) -> ctypes.CDLL:
    """The library of kernels of a kind ("cpu" or "cuda"), built now if need be; the outcome is kept
    for the process.

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
    """Forgets what was loaded or failed, so that the next use tries again."""
    with _loading:
        _loaded.clear()


def _load(kind: str) -> ctypes.CDLL:
    mode = os.environ.get("ADAPTIVE_LONGFORMER_KERNELS", "on")
    if mode == "off":
        raise ExtensionUnavailableError("ADAPTIVE_LONGFORMER_KERNELS is 'off'")
    if mode not in ("on", "cached"):
        raise ExtensionUnavailableError(
            f"ADAPTIVE_LONGFORMER_KERNELS is {mode!r}, 'on', 'cached' or 'off' is allowed"
        )
    folder = build_folder(kind)
    try:
        if not is_built(kind):
            if mode == "cached":
                raise ExtensionUnavailableError(
                    f"ADAPTIVE_LONGFORMER_KERNELS is 'cached' and {folder} holds no finished build"
                )
            folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            refuse_unsafe_folder(folder.parent)
            with _locked(folder):
                # Another process may have built while this one waited.
                if not is_built(kind):
                    _build(kind, folder)
        refuse_unsafe_folder(folder)
        library = folder / (folder / _DONE).read_text()
    except OSError as error:
        raise ExtensionUnavailableError(
            f"{error}; ADAPTIVE_LONGFORMER_CACHE names a folder that can be written"
        ) from error
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise ExtensionUnavailableError(f"{error}; deleting {folder} builds it anew") from error


def build_folder(kind: str) -> Path:
    """Where the build for this source, torch, Python and processor belongs."""
    cache = os.environ.get("ADAPTIVE_LONGFORMER_CACHE")
    if cache is None:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        cache = Path(base) / "adaptive_longformer"
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
    return Path(cache) / f"{kind}-{digest.hexdigest()[:20]}"


def refuse_unsafe_folder(folder: Path) -> None:
    """Raises unless only its owner, this user or root, can put code there."""
    for path in (folder, *folder.resolve().parents):
        status = path.stat()
        is_sticky_parent = path != folder and status.st_mode & stat.S_ISVTX
        if status.st_mode & stat.S_IWOTH and not is_sticky_parent:
            raise ExtensionUnavailableError(
                f"every user can write to {path}, and code from {folder} would be run"
            )
    if folder.stat().st_uid not in (os.geteuid(), 0):
        raise ExtensionUnavailableError(f"{folder} belongs to another user")


def _compile_flags() -> list[str]:
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    return ["-O3", "-std=c++17", native, "-ffp-contract=fast"]


def _device_capabilities(kind: str) -> list[str]:
    """Compute capabilities of the visible GPUs, for which cpp_extension builds."""
    if kind != "cuda":
        return []
    count = torch.cuda.device_count()
    return sorted({str(torch.cuda.get_device_capability(index)) for index in range(count)})


def _check_cuda_compiler(cuda_home: str | None) -> None:
    """Raises unless there is an nvcc that fits torch; cpp_extension would find out late, or not."""
    if torch.version.cuda is None:
        raise ExtensionUnavailableError("this torch is built without CUDA")
    if cuda_home is None:
        raise ExtensionUnavailableError("no nvcc: CUDA_HOME is not set and nvcc was not found")
    command = [str(Path(cuda_home) / "bin" / "nvcc"), "--version"]
    version = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+)\.", version)
    major = torch.version.cuda.split(".")[0]
    if match is None or match[1] != major:
        found = version.strip() if match is None else f"CUDA {match[1]}"
        raise ExtensionUnavailableError(f"nvcc is of {found}, torch of CUDA {major}")


def _processor() -> str:
    """What -march=native depends on: a cache in a shared home serves machines of several kinds."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the build's lock, which the system releases if this process dies."""
    try:
        import fcntl
    except ImportError as error:
        raise ExtensionUnavailableError(f"no file locks on {platform.system()}") from error
    with open(f"{folder}.lock", "w") as file:
        deadline, is_announced = time.monotonic() + LOCK_TIMEOUT, False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not is_announced:
                    logger.info("Waiting for another process that builds in %s", folder)
                    is_announced = True
                if time.monotonic() > deadline:
                    raise ExtensionUnavailableError(
                        f"another process has held {folder}.lock for {LOCK_TIMEOUT:.0f} seconds"
                    ) from None
                time.sleep(0.1)
        yield


def _build(kind: str, folder: Path) -> None:
    """Compiles into the folder; the marker goes in last."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        raise ExtensionUnavailableError(f"no C++ compiler: {compiler} was not found")
    # What a killed builder left, torch's own lock file among it, would make every later build wait.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    logger.info("Building the compiled %s kernels in %s (some seconds, once)", kind, folder)
    # Imported here: it is slow, and needed only by the process that builds.
    from torch.utils import cpp_extension

    if kind == "cuda":
        _check_cuda_compiler(cpp_extension.CUDA_HOME)
    # cpp_extension builds one name only once per process, so every attempt has its own.
    name = f"adaptive_longformer_{kind}_{next(_attempts)}"
    with _ninja_on_path():
        try:
            cpp_extension.load(
                name,
                [str(path) for path in sorted((SOURCES / kind).glob(_PATTERNS[kind]))],
                extra_cflags=_compile_flags(),
                extra_cuda_cflags=_CUDA_FLAGS,
                build_directory=str(folder),
                is_python_module=False,
                verbose=os.environ.get("ADAPTIVE_LONGFORMER_VERBOSE") == "1",
            )
        except (RuntimeError, subprocess.CalledProcessError) as error:
            lines = str(error).splitlines()
            reason = next((line for line in lines if "error: " in line), lines[0])
            raise ExtensionUnavailableError(f"the build failed: {reason.strip()}") from error
    (folder / _DONE).write_text(f"{name}.so")


@contextlib.contextmanager
def _ninja_on_path() -> Iterator[None]:
    """Lets cpp_extension find the ninja of this environment, activated or not."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join((before, str(Path(sys.executable).parent)))
    try:
        if shutil.which("ninja") is None:
            raise ExtensionUnavailableError("ninja is not installed")
        yield
    finally:
        os.environ["PATH"] = before
