"""The CUDA kernels as nvcc compiles them, their PTX run instruction by instruction on the CPU."""

import contextlib
import ctypes
import os
import re
import shutil
import subprocess
from itertools import product

import pytest
import torch
from emulation import CUDA_SOURCES, HERE
from ptx import cpp_of
from test_emulated_cuda import SEED, assert_small, errors, masks, random_layout

from adaptive_longformer.attention.backends import cuda
from adaptive_longformer.attention.functional import make_call
from adaptive_longformer.attention.kernels.cuda_launches import (
    ELEMENT_TYPES,
    INSTANCES,
    KERNELS,
    Instance,
    instance_of,
)
from adaptive_longformer.attention.operator import operator_arguments
from adaptive_longformer.attention.reference import reference_attention
from adaptive_longformer.patterns import SlidingWindow
from adaptive_longformer.testing import use_library

pytestmark = pytest.mark.slow

# Every type, head_dim, query block and architecture once or more.
# The others take minutes: ADAPTIVE_LONGFORMER_FULL_GRID.
SOME_INSTANCES = [
    (Instance(1, 64, 64), 90), (Instance(2, 128, 128), 80), (Instance(1, 96, 128), 120),
    (Instance(2, 32, 64), 90),
]  # fmt: skip
FULL_GRID = [*product(INSTANCES, (80, 90, 120))]


def mangled(instance: Instance, kernel: str) -> str:
    """The name of an instance's kernel in the PTX."""
    numbers = instance[:1] if kernel in ("row_sums", "add_parts") else instance
    name = f"{kernel}_kernel"
    arguments = "".join(f"Li{number}E" for number in numbers)
    return f"_ZN8adaptive{len(name)}{name}I{arguments}EEvNS_9ArgumentsE"


class PtxLibrary:
    """Stands for the library of the kernels of one instance."""

    def __init__(self, library: ctypes.CDLL, instance: Instance) -> None:
        self.library, self.instance = library, instance
        library.ptx_run.restype = ctypes.c_char_p

    def launch(self, launch, arguments, device, stream) -> None:
        assert instance_of(arguments) == self.instance
        grid = (ctypes.c_int * 3)(launch.grid_x, launch.grid_y, launch.grid_z)
        error = self.library.ptx_run(
            mangled(self.instance, launch.name).encode(), grid, launch.threads,
            launch.shared_memory, ctypes.byref(arguments),
        )  # fmt: skip
        if error is not None:
            raise RuntimeError(f"{launch.name}: {error.decode()}")

    def know(self, tensors) -> None:
        """Allows access to these tensors and nothing else."""
        self.library.ptx_forget()
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self.library.ptx_know(
                ctypes.c_ulonglong(storage.data_ptr()), ctypes.c_ulonglong(storage.nbytes())
            )


def build(folder, instance, architecture, kernels=KERNELS, change=lambda ptx: ptx) -> PtxLibrary:
    """nvcc's PTX of an instance's kernels, changed, translated and loaded."""
    nvcc, compiler = shutil.which("nvcc"), shutil.which("g++")
    if nvcc is None or compiler is None:
        pytest.skip("no nvcc to write PTX, or no g++ to compile what it is translated to")
    source, ptx, machine = (folder / f"kernels.{suffix}" for suffix in ("cu", "ptx", "cpp"))
    names = (instance.expression(kernel) for kernel in kernels)
    lines = [f"template __global__ void {name}(const adaptive::Arguments);" for name in names]
    source.write_text("\n".join(['#include "forward.cuh"', '#include "backward.cuh"', *lines]))
    subprocess.run(
        [nvcc, "-std=c++17", f"-arch=compute_{architecture}", "-ptx", f"-I{CUDA_SOURCES}",
         str(source), "-o", str(ptx)],
        check=True,
    )  # fmt: skip
    machine.write_text(cpp_of(change(ptx.read_text())))
    library = folder / "kernels.so"
    subprocess.run(
        [compiler, "-O0", "-std=c++17", "-fPIC", "-shared", f"-I{CUDA_SOURCES}", f"-I{HERE}",
         str(machine), "-o", str(library)],
        check=True,
    )  # fmt: skip
    return PtxLibrary(ctypes.CDLL(str(library)), instance)


def use(library, monkeypatch) -> contextlib.AbstractContextManager:
    """Makes the PTX the library of the CUDA kernels, which may touch a call's tensors only."""
    run = cuda._Call.run

    def checked_run(call, launches):
        library.know(call._kept_alive)
        run(call, launches)

    monkeypatch.setattr(cuda._Call, "run", checked_run)
    return use_library("cuda", library)


@pytest.mark.parametrize(
    ("instance", "architecture"),
    FULL_GRID if os.environ.get("ADAPTIVE_LONGFORMER_FULL_GRID") else SOME_INSTANCES,
    ids=str,
)
def test_ptx_matches_reference(instance, architecture, tmp_path, monkeypatch):
    """One test for all calls of an instance: building it takes longest."""
    with use(build(tmp_path, instance, architecture), monkeypatch):
        dtypes = {number: dtype for dtype, number in ELEMENT_TYPES.items()}
        dtype = dtypes[instance.element_type]

        def assert_call_matches(length, **options):
            layout = random_layout(length, instance.query_block_size)
            results = errors(layout, length, head_dim=instance.head_dim, dtype=dtype, **options)
            assert_small(results, dtype)

        for length in (1, 64, 65, 150):
            # The gradient of the bias of a single tile is one number, a sum that may cancel.
            options = {"with_bias": length != 64, "dropout_p": 0.2, "dropout_seed": SEED}
            assert_call_matches(length, **options, **masks(length))
        assert_call_matches(140, heads=2, span=60.0, is_causal=True, with_bias=True)
        # Lists shared by batch rows, and columns that are added up in parts.
        original = cuda.gradient_items
        assert (original(random_layout(200, instance.query_block_size), 1).column_slots > 2).any()
        monkeypatch.setattr(cuda, "gradient_items", lambda layout: original(layout, 1))
        assert_call_matches(200, batch=2, **masks(200, 2))


# What a compiler might get wrong: (regular expression, replacement, which of its matches).
MUTANTS = {
    "waits_for_too_little": (r"cp\.async\.wait_group 1", "cp.async.wait_group 2", 0),
    "no_barrier_after_search": (r"bar\.sync\s+0;", "", 0),
    "no_barrier_before_use": (r"bar\.sync\s+0;", "", 1),
    "no_barrier_after_use": (r"bar\.sync\s+0;", "", 2),
    "wrong_rank": (r"popc\.b32(\s+%r\d+), %r\d+", r"mov.b32\1, 0", 0),
    "not_transposed": (r"x4\.trans\.shared", "x4.shared", 0),
    "halves_swapped": (r"(cvt\.rn\.bf16x2\.f32 %r\d+),(%f\d+),(%f\d+)", r"\1,\3,\2", 0),
    "operands_swapped": (r"(mma\S+ \{.*?\},\{)(%r\d+),(%r\d+)", r"\1\3,\2", 0),
    "wrong_lane": (r"(shfl\S+\s+%r\d+\|%p\d+, %r\d+), %r\d+,", r"\1, 4,", -1),
    "stored_elsewhere": (r"(st\.global\.u32\s+\[%rd\d+)", r"\1+16384", 0),
    "stored_askew": (r"(st\.global\.u32\s+\[%rd\d+)", r"\1+2", 0),
}


@pytest.mark.parametrize("mutant", ["none", *MUTANTS])
def test_ptx_machine_catches(mutant, tmp_path, monkeypatch):
    """One wrong instruction gives wrong numbers or an error; without it the same test passes."""

    def change(ptx: str) -> str:
        if mutant == "none":
            return ptx
        pattern, replacement, index = MUTANTS[mutant]
        match = list(re.finditer(pattern, ptx))[index]
        return ptx[: match.start()] + match.expand(replacement) + ptx[match.end() :]

    library = build(tmp_path, Instance(1, 32, 64), 90, ["forward"], change)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 1, 200, 32, generator=generator).bfloat16() for _ in range(3)]
    call = make_call(*tensors, SlidingWindow(90))
    expected, _ = reference_attention(make_call(*map(torch.Tensor.double, tensors), call.pattern))
    try:
        with use(library, monkeypatch):
            output, _ = cuda.forward(operator_arguments(call))
    except RuntimeError as error:
        assert mutant != "none" and str(error).startswith("forward: ")
        return
    is_correct = torch.allclose(output.double(), expected, rtol=0, atol=0.02)
    assert is_correct == (mutant == "none")
