"""What compiles the kernels, and which builds are told apart."""

import ctypes
import platform
import shutil
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from adaptive_longformer.attention.kernels import build
from adaptive_longformer.attention.kernels.cache import KernelsUnavailableError
from adaptive_longformer.attention.kernels.cuda_launches import ELEMENT_TYPES, HEAD_DIMS

needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None or sys.platform == "win32", reason="no C++ compiler (c++)"
)


@needs_compiler
def test_every_source_is_in_the_library(sandbox, tmp_path):
    (sandbox / "csrc" / "cpu" / "other.cpp").write_text('extern "C" int other() { return 7; }')
    folder = tmp_path / "build"
    folder.mkdir()
    name = build.build_library("cpu", folder)
    library = ctypes.CDLL(str(folder / name))
    assert (library.answer(), library.other()) == (42, 7)
    assert [path.name for path in folder.iterdir()] == [name]


@needs_compiler
def test_the_first_error_of_a_compiler_is_the_reason(sandbox, tmp_path):
    (sandbox / "csrc" / "cpu" / "answer.cpp").write_text("int answer( { }")
    with pytest.raises(KernelsUnavailableError, match=r"build failed: .*answer.cpp:1.* error: "):
        build.build_library("cpu", tmp_path)


@needs_compiler
def test_a_compiler_may_be_a_command_with_arguments(sandbox, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("CXX", f"{shutil.which('env')} ANY=1 c++ -DANSWER='\"4 2\"'")
    monkeypatch.setenv("ADAPTIVE_LONGFORMER_VERBOSE", "1")
    source = sandbox / "csrc" / "cpu" / "answer.cpp"
    source.write_text('extern "C" const char* answer() { return ANSWER; }')
    build.check_compilers("cpu")
    folder = tmp_path / "build"
    folder.mkdir()
    assert b"4 2" in (folder / build.build_library("cpu", folder)).read_bytes()
    # With the option, the compiler's commands are there to be read.
    assert "answer.cpp" in capfd.readouterr().out


def test_what_changes_the_machine_code_has_another_folder(sandbox, monkeypatch):
    """Two versions of the package, of torch, of Python or machines in one cache do not meet."""
    folders = [build.library_folder("cpu")]
    for owner, name, value in (
        (torch, "__version__", "3.0"),
        (sys, "version", "3.99"),
        (platform, "platform", lambda: "Linux-99"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, value)
            folders.append(build.library_folder("cpu"))
    (sandbox / "csrc" / "cpu" / "answer.cpp").write_text('extern "C" int answer() { return 43; }')
    folders.append(build.library_folder("cpu"))
    assert len(set(folders)) == len(folders)
    assert all(folder.parent == sandbox / "cache" for folder in folders)


def test_another_compiler_finds_what_one_built(sandbox, monkeypatch):
    before = build.library_folder("cpu")
    monkeypatch.setenv("CXX", "another-compiler")
    assert build.library_folder("cpu") == before


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    """Writes a script that stands for the nvcc of a torch of CUDA 13; no GPU is visible."""
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setenv("CXX", sys.executable)  # any program that is there

    def write(script):
        path = tmp_path / "bin" / "nvcc"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o700)

    return write


def test_a_toolkit_without_a_fitting_nvcc_is_named(nvcc):
    with pytest.raises(KernelsUnavailableError, match=r"no nvcc: .* does not exist"):
        build.check_compilers("cuda")
    for script, reason in (
        ("echo release 12.8, V12.8.93", "nvcc is of CUDA 12, torch of CUDA 13"),
        ("exit 1", "nvcc is of an unknown version, torch of CUDA 13"),
    ):
        nvcc(script)
        with pytest.raises(KernelsUnavailableError, match=reason):
            build.check_compilers("cuda")


def test_nvcc_needs_a_gpu_or_a_list_of_architectures_to_compile_for(nvcc, monkeypatch):
    nvcc("echo release 13.0, V13.0.88")
    with pytest.raises(KernelsUnavailableError, match="no GPU is visible"):
        build.check_compilers("cuda")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    build.check_compilers("cuda")


def test_nvcc_compiles_for_the_listed_architectures(nvcc, tmp_path, monkeypatch):
    nvcc(f'echo "$@" >> {tmp_path}/arguments; echo error: enough; exit 1')
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0a;12.0+PTX")
    folder = tmp_path / "build"
    folder.mkdir()
    with pytest.raises(KernelsUnavailableError, match="the build failed: error: enough"):
        build.build_library("cuda", folder)
    said = [line.split() for line in (tmp_path / "arguments").read_text().splitlines()]
    compilations = [arguments for arguments in said if "-c" in arguments]
    assert compilations  # several files may have been begun when the first failed
    for arguments in compilations:
        codes = [argument for argument in arguments if argument.startswith("-gencode")]
        assert sorted(codes) == [
            "-gencode=arch=compute_120,code=compute_120",
            "-gencode=arch=compute_120,code=sm_120",
            "-gencode=arch=compute_80,code=sm_80",
            "-gencode=arch=compute_90a,code=sm_90a",
        ]
        (source,) = (argument for argument in arguments if argument.endswith(".cu"))
        assert Path(source).parent == build.SOURCES / "cuda"


def test_every_type_and_head_dim_of_the_cuda_kernels_has_a_file():
    """What none defines would be missing only when it is launched."""
    for dtype, head_dim in product(ELEMENT_TYPES, HEAD_DIMS):
        name = str(dtype).removeprefix("torch.")
        source = (build.SOURCES / "cuda" / f"{name}_{head_dim}.cu").read_text()
        assert f"launch_on_gpu<adaptive::{name.upper()}, {head_dim}>" in source


def test_a_list_of_architectures_that_are_none_is_the_reason(nvcc, tmp_path, monkeypatch):
    nvcc("exit 1")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Harbour")
    with pytest.raises(KernelsUnavailableError, match=r"the build failed: .*Harbour"):
        build.build_library("cuda", tmp_path)


def test_libraries_are_looked_for_where_nvcc_says_they_are(nvcc, tmp_path):
    nvcc("""echo '#$ LIBRARIES=  "-L/far/lib/stubs" "-L/far/lib"' >&2""")
    assert build._link_flags(build.find_nvcc()) == ["-L/far/lib/stubs", "-L/far/lib"]


def test_a_build_for_listed_architectures_serves_where_these_are_listed(monkeypatch):
    """Made where no GPU is visible, it is found where one is; another list is another build."""
    folders = []
    for listed, num_gpus in (("9.0", 0), ("9.0", 1), ("8.0", 1), ("", 2)):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=num_gpus: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, index))
        folders.append(build.library_folder("cuda"))
    assert folders[0] == folders[1] and len(set(folders)) == 3
