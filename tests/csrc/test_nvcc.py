"""What ptxas says of the CUDA kernels: they compile for each architecture and do not spill."""

import os
import re
import shutil
import subprocess
from itertools import product
from pathlib import Path

import pytest
from emulation import CUDA_SOURCES

from adaptive_longformer.attention.kernels import build

# bfloat16 only: float16 differs in two instructions.
KERNELS = (
    "forward_kernel<1, {dim}, {block}, 64>",
    "grad_keys_kernel<1, {dim}, {block}>",
    "grad_queries_kernel<1, {dim}, {block}, 64>",
)
# Of blocks smaller than a tile.
SMALL_KERNELS = (
    "forward_kernel<1, {dim}, 64, 16>",
    "grad_small_keys_kernel<1, {dim}>",
    "grad_queries_kernel<1, {dim}, 64, 16>",
)


# Every pair of values occurs; all combinations take minutes.
PAIRS = [
    (32, 64, 80), (32, 128, 90), (64, 64, 90), (64, 128, 80), (96, 64, 80), (96, 128, 90),
    (128, 64, 90), (128, 128, 80),
]  # fmt: skip
FULL_GRID = [*product((32, 64, 96, 128), (64, 128), (80, 90))]


@pytest.mark.slow
@pytest.mark.parametrize(
    "head_dim, query_block, architecture",
    FULL_GRID if os.environ.get("ADAPTIVE_LONGFORMER_FULL_GRID") else PAIRS,
)
def test_kernels_do_not_spill(architecture, head_dim, query_block, tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    source = tmp_path / "instance.cu"
    kernels = [
        kernel.format(dim=head_dim, block=query_block)
        for kernel in KERNELS + (SMALL_KERNELS if query_block == 64 else ())
    ]
    lines = [
        f"template __global__ void adaptive::{kernel}(adaptive::Arguments);" for kernel in kernels
    ]
    source.write_text("\n".join(['#include "launch.cuh"', *lines]))
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    run = subprocess.run(
        [nvcc, "-O3", "-std=c++17", target, "-Xptxas", "-v", f"-I{CUDA_SOURCES}", "-cubin",
         str(source), "-o", str(tmp_path / "instance.cubin")],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    spills = re.findall(
        r"Compiling entry function '(\w+)'[^']*'[^']*'([^']*spill loads)", run.stderr
    )
    assert len(spills) == len(kernels), run.stderr
    assert not [text for text in spills if re.search(r"[1-9]\d* bytes spill", text[1])], spills


def test_the_runtime_library_is_found_where_nvcc_says():
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    folders = [flag.removeprefix("-L") for flag in build._link_flags(Path(nvcc))]
    assert any(list(Path(folder).glob("libcudart.so*")) for folder in folders), folders
