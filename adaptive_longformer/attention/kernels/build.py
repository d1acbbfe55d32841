"""Compiles the kernels: the sources, the compilers, their flags, and what a build depends on."""

import contextlib
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from adaptive_longformer.attention.kernels.cache import KernelsUnavailableError, cache_folder

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parents[2] / "csrc"
_CUDA_FLAGS = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC", "-shared", "--cudart", "shared"]


def library_folder(kind: str) -> Path:
    """Where the library for this source, torch, Python and processor belongs.

    Not for this compiler: what another one built is as right, and serves where there is none.

    Args:
        kind: "cpu" or "cuda".
    """
    digest = hashlib.sha256()
    for path in sorted((SOURCES / kind).iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    parts = (
        *(_CUDA_FLAGS if kind == "cuda" else _compile_flags()),
        *([str(torch.version.cuda), *_capabilities()] if kind == "cuda" else []),
        torch.__version__,
        sys.version,
        platform.platform(),
        platform.machine(),
        _processor(),
    )
    digest.update("\0".join(parts).encode())
    return cache_folder() / f"{kind}-{digest.hexdigest()[:20]}"


def check_compilers(kind: str) -> None:
    """Raises KernelsUnavailableError unless what a build of a kind needs is there."""
    try:
        program = (shlex.split(cpp_compiler()) or ["an empty CXX"])[0]
    except ValueError as error:
        raise KernelsUnavailableError(f"CXX is {cpp_compiler()!r}: {error}") from error
    if shutil.which(program) is None:
        raise KernelsUnavailableError(f"no C++ compiler: {program} was not found")
    if kind == "cuda":
        _check_nvcc()
        if not _capabilities():
            raise KernelsUnavailableError("no GPU is visible for which nvcc could compile")
        _code_flags()


def build_library(kind: str, folder: Path) -> str:
    """Compiles the kernels of a kind into an empty folder; the name of the library there.

    Raises:
        KernelsUnavailableError: with the first error of the compiler.
    """
    logger.info("Building the compiled %s kernels in %s (some seconds, once)", kind, folder)
    library = folder / "kernels.so"
    if kind == "cuda":
        sources = sorted((SOURCES / kind).glob("*.cu"))
        _run(find_nvcc(), *_CUDA_FLAGS, *_code_flags(), *sources, "-o", library)
        return library.name
    compiler = shlex.split(cpp_compiler())

    def compiled(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        _run(*compiler, *_compile_flags(), "-fPIC", "-c", source, "-o", target)
        return target

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compiled, sorted((SOURCES / kind).glob("*.cpp"))))
    torch_libraries = (f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10")
    _run(*compiler, "-shared", *objects, *torch_libraries, "-o", library)
    for path in objects:
        path.unlink()
    return library.name


def cpp_compiler() -> str:
    """The command that compiles C++."""
    return os.environ.get("CXX", "c++")


def find_nvcc() -> Path | None:
    """The nvcc of CUDA_HOME or CUDA_PATH if one is set, of the PATH, or of the usual place."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = None if home else shutil.which("nvcc")
    nvcc = Path(found) if found else Path(home or "/usr/local/cuda") / "bin" / "nvcc"
    return nvcc if home or nvcc.exists() else None


def _run(*command: object) -> None:
    """Runs a compiler; its output goes to the log.

    Raises:
        KernelsUnavailableError: it failed, with its first error.
    """
    words = [str(word) for word in command]
    # In English, so that the error is found in it.
    result = subprocess.run(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", env={**os.environ, "LC_ALL": "C"}, check=False,
    )  # fmt: skip
    is_verbose = os.environ.get("ADAPTIVE_LONGFORMER_VERBOSE") == "1"
    level = logging.WARNING if is_verbose else logging.DEBUG
    logger.log(level, "%s\n%s", shlex.join(words), result.stdout)
    if result.returncode != 0:
        lines = result.stdout.splitlines() or [f"{words[0]} ends with {result.returncode}"]
        reason = next((line for line in lines if "error: " in line.lower()), lines[0])
        raise KernelsUnavailableError(f"the build failed: {reason.strip()}")


def _compile_flags() -> list[str]:
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    return ["-O3", "-std=c++17", native, "-ffp-contract=fast"]


def _capabilities() -> list[str]:
    """What nvcc builds for: the listed compute capabilities, or those of the visible GPUs."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if listed:
        return listed
    count = torch.cuda.device_count()
    visible = (torch.cuda.get_device_capability(index) for index in range(count))
    return sorted({f"{major}.{minor}" for major, minor in visible})


def _code_flags() -> list[str]:
    """nvcc's flags for the capabilities."""
    flags = []
    for capability in _capabilities():
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", capability)
        if match is None:
            raise KernelsUnavailableError(
                f"TORCH_CUDA_ARCH_LIST names {capability!r}, numbers as '8.0;9.0+PTX' are allowed"
            )
        number = match[1] + match[2]
        code = f"[sm_{number},compute_{number}]" if match[3] else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    return flags


def _check_nvcc() -> None:
    """Raises unless there is an nvcc that fits torch."""
    assert torch.version.cuda is not None
    nvcc = find_nvcc()
    if nvcc is None:
        raise KernelsUnavailableError("no nvcc: CUDA_HOME is not set and nvcc was not found")
    if not nvcc.exists():
        raise KernelsUnavailableError(f"no nvcc: {nvcc} does not exist")
    command = [str(nvcc), "--version"]
    version = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    match = re.search(r"release (\d+)\.", version)
    major = torch.version.cuda.split(".")[0]
    if match is None or match[1] != major:
        found = version.strip() or "an unknown version" if match is None else f"CUDA {match[1]}"
        raise KernelsUnavailableError(f"nvcc is of {found}, torch of CUDA {major}")


def _processor() -> str:
    """What -march=native depends on: a cache in a shared home serves machines of several kinds."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor()
