"""The CUDA kernels, compiled for the CPU with the emulator."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from adaptive_longformer.attention.kernels.build import SOURCES
from adaptive_longformer.attention.kernels.cuda_library import CudaLibrary

HERE = Path(__file__).parent
CUDA_SOURCES = SOURCES / "cuda"


def build_emulator(folder: Path, sources: Path = CUDA_SOURCES) -> CudaLibrary:
    """Compiles the kernels with the emulator and loads them."""
    return CudaLibrary(ctypes.CDLL(str(compile_emulated("emulator.cpp", folder, sources))))


def compile_emulated(source: str, folder: Path, sources: Path = CUDA_SOURCES) -> Path:
    """The library made of a source of this folder, with the kernels and the emulator."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to build the emulator with")
    target = folder / f"{Path(source).stem}.so"
    subprocess.run(
        [compiler, "-O1", "-std=c++17", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-fPIC",
         "-shared", f"-I{sources}", f"-I{HERE}", str(HERE / source), "-o", str(target)],
        check=True,
    )  # fmt: skip
    return target
