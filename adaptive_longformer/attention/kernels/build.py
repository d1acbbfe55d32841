"""Compiles the kernels through torch.utils.cpp_extension: sources, flags, what a build depends on.

The sources include no header of torch, and the library has a plain C interface.
"""

import contextlib
import hashlib
import itertools
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from adaptive_longformer.attention.kernels.cache import KernelsUnavailableError, cache_folder

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parents[2] / "csrc"
_PATTERNS = {"cpu": "*.cpp", "cuda": "*.cu"}
_CUDA_FLAGS = ["-O3", "-std=c++17"]
_attempts = itertools.count()


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
    """Raises KernelsUnavailableError unless what a build of a kind needs is there; cpp_extension
    would find out late, or not.
    """
    try:
        program = (shlex.split(cpp_compiler()) or ["an empty CXX"])[0]
    except ValueError as error:
        raise KernelsUnavailableError(f"CXX is {cpp_compiler()!r}: {error}") from error
    if shutil.which(program) is None:
        raise KernelsUnavailableError(
            f"no C++ compiler: {program} was not found; install g++ or clang++ (CXX names another) "
            "and the kernels, several times as fast, build themselves"
        )
    if shutil.which("ninja", path=_search_path()) is None:
        raise KernelsUnavailableError("ninja is not installed")
    if kind == "cuda":
        _check_nvcc()
        if not _capabilities():
            raise KernelsUnavailableError("no GPU is visible for which nvcc could compile")


def build_library(kind: str, folder: Path) -> str:
    """Compiles the kernels of a kind into an empty folder, which holds nothing else then; the name
    of the library there.

    Raises:
        KernelsUnavailableError: with the first error of the compiler.
    """
    logger.info("Building the compiled %s kernels in %s (some seconds, once)", kind, folder)
    # Imported here: it is slow, and needed only by the process that builds.
    from torch.utils import cpp_extension

    # cpp_extension builds one name only once per process, so every attempt has its own.
    name = f"adaptive_longformer_{kind}_{next(_attempts)}"
    with _environment_of_builds(folder):
        try:
            cpp_extension.load(
                name,
                [str(path) for path in sorted((SOURCES / kind).glob(_PATTERNS[kind]))],
                extra_cflags=_compile_flags(),
                extra_cuda_cflags=_CUDA_FLAGS,
                extra_ldflags=_link_flags(find_nvcc()) if kind == "cuda" else [],
                build_directory=str(folder),
                is_python_module=False,
                verbose=os.environ.get("ADAPTIVE_LONGFORMER_VERBOSE") == "1",
            )
        except (RuntimeError, ValueError, subprocess.CalledProcessError) as error:
            lines = str(error).splitlines() or [type(error).__name__]
            reason = next((line for line in lines if "error: " in line.lower()), lines[0])
            raise KernelsUnavailableError(f"the build failed: {reason.strip()}") from error
        except OSError:
            # It loads what it has built; why that fails is asked of the file that is kept.
            if not (folder / f"{name}.so").exists():
                raise
    library = (folder / f"{name}.so").rename(folder / "kernels.so")
    for path in folder.iterdir():
        if path != library:
            path.unlink()
    return library.name


def compiler_of(kind: str) -> str:
    """What compiles the kernels of a kind."""
    return "nvcc" if kind == "cuda" else cpp_compiler()


def cpp_compiler() -> str:
    """The command that compiles C++."""
    return os.environ.get("CXX", "c++")


def find_nvcc() -> Path | None:
    """The nvcc that cpp_extension uses, which torch looks for once per process; None: it has none,
    as where torch is built without CUDA.
    """
    from torch.utils import cpp_extension

    home = cpp_extension.CUDA_HOME
    return None if home is None else Path(home) / "bin" / "nvcc"


def _link_flags(nvcc: Path | None) -> list[str]:
    """Where nvcc says that its libraries are. What is found as nvcc may be a script that starts one
    elsewhere, and cpp_extension looks only beside the script.
    """
    command = [str(nvcc), "--dryrun", "-x", "cu", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    line = next((line for line in said.splitlines() if line.startswith("#$ LIBRARIES=")), "")
    return re.findall(r'"(-L[^"]+)"', line)


def _search_path() -> str:
    """Where programs are looked for: also beside this Python, activated or not."""
    return os.pathsep.join((os.environ.get("PATH", ""), str(Path(sys.executable).parent)))


@contextlib.contextmanager
def _environment_of_builds(folder: Path) -> Iterator[None]:
    """Lets cpp_extension find the ninja of this environment, and compilers answer in English, so
    that their error is found.
    """
    changes = {"PATH": _search_path(), "LC_ALL": "C"}
    if len(shlex.split(cpp_compiler())) > 1:
        # cpp_extension takes CXX for the name of a program, whatever is in it.
        program = folder / "c++"
        program.write_text(f'#!/bin/sh\nexec {cpp_compiler()} "$@"\n')
        program.chmod(0o700)
        changes["CXX"] = str(program)
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


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
