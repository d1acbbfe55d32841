"""Compiles CUDA sources without nvcc, by the library NVRTC that torch's CUDA packages bring."""

import ctypes
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from adaptive_longformer.attention.kernels.cache import KernelsUnavailableError

# Functions that say nothing are of the device: for NVRTC there is no host.
OPTIONS = ("-std=c++17", "--device-as-default-execution-space")


class CompiledProgram(NamedTuple):
    """Machine code for one architecture, and the names that its kernels have there, by their C++
    expressions.
    """

    cubin: bytes
    names: dict[str, str]


class Nvrtc:
    """A loaded NVRTC.

    Args:
        library: the loaded library.
        path: where it comes from.
    """

    def __init__(self, library: ctypes.CDLL, path: str) -> None:
        self.path, self._library = path, library
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
        self.version = (major.value, minor.value)

    def compile(
        self, source: str, headers: dict[str, str], expressions: list[str], architecture: str
    ) -> CompiledProgram:
        """Compiles a source for one architecture.

        Args:
            source: C++ with inclusions of the headers.
            headers: contents by the name in the inclusion; no file is read.
            expressions: the kernels to instantiate, such as "space::kernel<1, 64>".
            architecture: such as "sm_90".

        Raises:
            KernelsUnavailableError: with the first error of the compiler.
        """
        library, program = self._library, ctypes.c_void_p()
        created = library.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), b"adaptive_longformer.cu",
            ctypes.c_int(len(headers)), _strings(headers.values()), _strings(headers),
        )  # fmt: skip
        self._check(created, "nvrtcCreateProgram")
        try:
            for expression in expressions:
                added = library.nvrtcAddNameExpression(program, expression.encode())
                self._check(added, expression)
            options = (f"--gpu-architecture={architecture}", *OPTIONS)
            error = library.nvrtcCompileProgram(
                program, ctypes.c_int(len(options)), _strings(options)
            )
            if error != 0:
                raise KernelsUnavailableError(
                    f"NVRTC {self.version[0]}.{self.version[1]} does not compile for "
                    f"{architecture}: {self._first_error(program) or self._text(error)}"
                )
            cubin = self._bytes(program, "CUBIN")
            return CompiledProgram(
                cubin, {expression: self._name(program, expression) for expression in expressions}
            )
        finally:
            library.nvrtcDestroyProgram(ctypes.byref(program))

    def _name(self, program: ctypes.c_void_p, expression: str) -> str:
        name = ctypes.c_char_p()
        found = self._library.nvrtcGetLoweredName(program, expression.encode(), ctypes.byref(name))
        self._check(found, expression)
        assert name.value is not None
        return name.value.decode()

    def _bytes(self, program: ctypes.c_void_p, what: str) -> bytes:
        """What nvrtcGet<what> gives."""
        size = ctypes.c_size_t()
        read_size = getattr(self._library, f"nvrtcGet{what}Size")
        self._check(read_size(program, ctypes.byref(size)), what)
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, f"nvrtcGet{what}")(program, buffer), what)
        return buffer.raw

    def _first_error(self, program: ctypes.c_void_p) -> str:
        log = self._bytes(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        lines = [line.strip() for line in log.splitlines() if line.strip()]
        return next((line for line in lines if "error" in line), lines[0] if lines else "")

    def _text(self, error: int) -> str:
        return self._library.nvrtcGetErrorString(error).decode()

    def _check(self, error: int, what: str) -> None:
        if error != 0:
            raise KernelsUnavailableError(f"NVRTC: {what}: {self._text(error)}")


def find_nvrtc(cuda_version: str | None) -> Nvrtc:
    """Loads the NVRTC of a major version of CUDA.

    Args:
        cuda_version: such as torch.version.cuda; None takes any NVRTC.

    Raises:
        KernelsUnavailableError: none was found.
    """
    major = None if cuda_version is None else cuda_version.split(".")[0]
    for path in _candidates(major):
        try:
            # NVRTC opens its builtins by name, which the loader does not look for beside it.
            for builtins in sorted(Path(path).parent.glob("libnvrtc-builtins.so*")):
                ctypes.CDLL(str(builtins))
            return Nvrtc(ctypes.CDLL(path), path)
        except OSError:
            continue
    wanted = "libnvrtc" if major is None else f"libnvrtc.so.{major}"
    raise KernelsUnavailableError(f"no NVRTC: {wanted} was not found")


def _candidates(major: str | None) -> Iterator[str]:
    """Files that may be the library, the most likely first."""
    packages = Path(torch.__file__).parents[1]
    folders = [Path(torch.__file__).parent / "lib", *sorted(packages.glob("nvidia/*/lib"))]
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            folders.append(Path(os.environ[variable]) / "lib64")
    folders.append(Path("/usr/local/cuda/lib64"))
    for folder in folders:
        for path in sorted(folder.glob("libnvrtc.so*")):
            match = re.fullmatch(r"libnvrtc\.so\.(\d+)(\.\d+)*", path.name)
            if match is not None and major in (None, match[1]):
                yield str(path)
    # What the system's loader knows.
    yield "libnvrtc.so" if major is None else f"libnvrtc.so.{major}"


def _strings(values: Iterable[str]) -> ctypes.Array:
    """An array of C strings."""
    encoded = [value.encode() for value in values]
    return (ctypes.c_char_p * len(encoded))(*encoded)
