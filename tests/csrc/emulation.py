"""The CUDA kernels, compiled for the CPU with the emulator."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from adaptive_longformer.attention.kernels.build import SOURCES

HERE = Path(__file__).parent
CUDA_SOURCES = SOURCES / "cuda"


def build_emulator(folder: Path, sources: Path = CUDA_SOURCES) -> ctypes.CDLL:
    """Compiles the kernels with the emulator and loads them."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to build the emulator with")
    target = folder / "emulator.so"
    subprocess.run(
        [compiler, "-O1", "-std=c++17", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-fPIC",
         "-shared", f"-I{sources}", f"-I{HERE}", str(HERE / "emulator.cpp"), "-o", str(target)],
        check=True,
    )  # fmt: skip
    return ctypes.CDLL(str(target))
