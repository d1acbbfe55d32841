"""The CUDA kernels without nvcc: compiled by NVRTC where it is, and the way there and to the launch
with an imitation of NVRTC and of the driver, which runs the kernels in the emulator.
"""

import ctypes
import shutil
import threading
from contextlib import ExitStack

import pytest
import torch
from emulation import CUDA_SOURCES, compile_emulated
from test_emulated_cuda import SEED, TOLERANCE, errors, masks, random_layout

from adaptive_longformer import doctor
from adaptive_longformer.attention.backends import cuda
from adaptive_longformer.attention.kernels import (
    build,
    cuda_driver,
    load,
    nvrtc,
)
from adaptive_longformer.attention.kernels.cache import KernelsUnavailableError
from adaptive_longformer.attention.kernels.cuda_launches import INSTANCES, KERNELS, Instance
from adaptive_longformer.attention.kernels.cuda_library import CudaProgram, compile_instance
from adaptive_longformer.attention.kernels.load import kernel_route
from adaptive_longformer.attention.kernels.nvrtc import Nvrtc, find_nvrtc
from adaptive_longformer.testing import use_library
from adaptive_longformer_command_line import main

# Every value of a parameter occurs with both architectures.
PAIRS = [
    (Instance(1, 32, 64), "sm_80"), (Instance(2, 64, 64), "sm_90"), (Instance(1, 96, 128), "sm_80"),
    (Instance(2, 128, 128), "sm_90"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("instance", "architecture"), PAIRS, ids=str)
def test_nvrtc_compiles_every_kernel(instance, architecture):
    try:
        compiler = find_nvrtc(torch.version.cuda)
    except KernelsUnavailableError as error:
        pytest.skip(str(error))
    headers = {path.name: path.read_text() for path in CUDA_SOURCES.glob("*.cuh")}
    program = compile_instance(compiler, headers, instance, architecture)
    assert program.cubin.startswith(b"\x7fELF")
    for kernel in KERNELS:
        name = program.names[instance.expression(kernel)]
        assert f"{kernel}_kernel" in name and name.encode() in program.cubin
    assert b"\0arguments_size\0" in program.cubin


@pytest.fixture(scope="session")
def imitation(tmp_path_factory):
    """The path of a library that is NVRTC and driver at once."""
    return compile_emulated("fake_cuda.cpp", tmp_path_factory.mktemp("fake_cuda"))


@pytest.fixture
def make_program(imitation, tmp_path, monkeypatch):
    """Makes programs with a cache of their own, for a GPU of compute capability 9.0."""
    monkeypatch.setattr(cuda_driver, "LIBRARY", str(imitation))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delenv("ADAPTIVE_LONGFORMER_KERNELS", raising=False)
    with ExitStack() as stack:

        def make(sources=CUDA_SOURCES):
            compiler = Nvrtc(ctypes.CDLL(str(imitation)), "imitation")
            driver = cuda_driver.CudaDriver()
            program = CudaProgram(compiler, driver, sources, tmp_path / "cache")
            stack.enter_context(use_library("cuda", program))
            return program

        yield make


def count_compilations(imitation):
    return ctypes.CDLL(str(imitation)).fake_compilations()


@pytest.mark.parametrize(("head_dim", "query_block"), [(32, 64), (128, 128)])
def test_kernels_launched_by_the_driver_match_reference(
    make_program, monkeypatch, head_dim, query_block
):
    make_program()
    original = cuda.gradient_items
    monkeypatch.setattr(cuda, "gradient_items", lambda layout: original(layout, 2))
    results = errors(
        random_layout(150, query_block), 150, head_dim=head_dim, with_bias=True, dropout_p=0.2,
        dropout_seed=SEED, **masks(150),
    )  # fmt: skip
    assert all(error <= TOLERANCE[torch.bfloat16] for error in results), results


def test_an_instance_is_compiled_once_and_kept(make_program, imitation, monkeypatch):
    before = count_compilations(imitation)
    first = make_program()
    layout = random_layout(70)
    errors(layout, 70)
    assert count_compilations(imitation) == before + 1
    assert first.folder.stat().st_mode & 0o777 == 0o700
    make_program()
    monkeypatch.setenv("ADAPTIVE_LONGFORMER_KERNELS", "cached")
    errors(layout, 70)
    assert count_compilations(imitation) == before + 1
    with pytest.raises(KernelsUnavailableError, match=r"'cached' and .* no finished build"):
        errors(layout, 70, dtype=torch.float16)


def test_machine_code_that_was_cut_is_compiled_again(make_program, imitation, caplog):
    program = make_program()
    program.build(["sm_90"], [Instance(1, 32, 64)])
    (code,) = program.folder.glob("*/program")
    code.write_bytes(code.read_bytes()[:-7])
    before = count_compilations(imitation)
    errors(random_layout(70), 70)
    assert count_compilations(imitation) == before + 1
    assert f"{code} is damaged" in caplog.text and "built anew" in caplog.text


def test_another_thread_gets_the_context_of_the_device(make_program):
    """As that of autograd, in which the context of torch need not be current."""
    make_program()
    layout, results = random_layout(70), []
    errors(layout, 70)
    thread = threading.Thread(target=lambda: results.append(errors(layout, 70)))
    thread.start()
    thread.join()
    assert all(error <= TOLERANCE[torch.bfloat16] for error in results[0])


def test_arguments_of_another_size_are_not_launched(make_program, monkeypatch):
    make_program()
    monkeypatch.setattr(cuda_driver.CudaDriver, "size_of", lambda *arguments: 8)
    with pytest.raises(AssertionError):
        errors(random_layout(70), 70)


def test_other_sources_get_another_folder(make_program, tmp_path):
    changed = tmp_path / "cuda"
    shutil.copytree(CUDA_SOURCES, changed)
    (changed / "tile.cuh").write_text((changed / "tile.cuh").read_text() + "// changed\n")
    assert make_program().folder != make_program(changed).folder


def test_what_does_not_compile_is_named(make_program, tmp_path):
    incomplete = tmp_path / "cuda"
    shutil.copytree(CUDA_SOURCES, incomplete)
    (incomplete / "tile.cuh").unlink()
    with pytest.raises(KernelsUnavailableError, match=r'cannot open source file "tile.cuh"'):
        make_program(incomplete).build(["sm_90"], [Instance(1, 32, 64)])
    with pytest.raises(KernelsUnavailableError, match=r"NVRTC 13\.0 does not compile for sm_10"):
        make_program().build(["sm_10"], [Instance(1, 32, 64)])


def test_a_cache_that_everybody_can_write_to_is_refused(make_program):
    program = make_program()
    program.build(["sm_90"], [Instance(1, 32, 64)])
    program.folder.chmod(0o777)
    with pytest.raises(KernelsUnavailableError, match=r"every user can write to .*nvrtc-"):
        errors(random_layout(70), 70)


def test_only_the_nvrtc_of_torchs_version_of_cuda_is_taken(imitation, tmp_path, monkeypatch):
    (tmp_path / "lib64").mkdir()
    for name in ("libnvrtc.so.99", "libnvrtc-builtins.so.99.1"):
        shutil.copy(imitation, tmp_path / "lib64" / name)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert find_nvrtc("99.1").path == str(tmp_path / "lib64" / "libnvrtc.so.99")
    with pytest.raises(KernelsUnavailableError, match=r"libnvrtc\.so\.98 was not found"):
        find_nvrtc("98.0")


@pytest.fixture
def no_nvcc(no_library, tmp_path, monkeypatch):
    """A torch of CUDA 98 on a machine without nvcc, and an empty cache."""

    def refuse(kind):
        raise KernelsUnavailableError("no nvcc: it was not found")

    monkeypatch.setattr(build, "check_compilers", refuse)
    monkeypatch.setattr(torch.version, "cuda", "98.0")
    monkeypatch.setenv("ADAPTIVE_LONGFORMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ADAPTIVE_LONGFORMER_KERNELS", raising=False)


@pytest.fixture
def found_nvrtc(imitation, monkeypatch):
    """A machine where the imitation is found as NVRTC and as the driver."""
    monkeypatch.setattr(cuda_driver, "LIBRARY", str(imitation))
    compiler = Nvrtc(ctypes.CDLL(str(imitation)), "imitation")
    monkeypatch.setattr(nvrtc, "find_nvrtc", lambda version: compiler)


def test_both_reasons_are_told_where_neither_nvcc_nor_nvrtc_is_there(no_nvcc, caplog):
    reason = load.why_unavailable("cuda") or ""
    assert "no nvcc: it was not found; no NVRTC: libnvrtc.so.98 was not found" in reason
    assert len(caplog.records) == 1 and reason in caplog.text


def test_nvrtc_stands_in_for_nvcc(no_nvcc, found_nvrtc, caplog):
    assert load.why_unavailable("cuda") is None
    assert isinstance(load.kernel_library("cuda"), CudaProgram)
    assert not caplog.records


def test_a_build_by_nvcc_that_fails_leaves_it_to_nvrtc(no_nvcc, found_nvrtc, monkeypatch):
    def fail(kind, folder):
        raise KernelsUnavailableError("the build failed")

    monkeypatch.setattr(build, "check_compilers", lambda kind: None)
    monkeypatch.setattr(build, "build_library", fail)
    assert kernel_route("cuda").compiler == "nvcc"
    assert isinstance(load.kernel_library("cuda"), CudaProgram)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert kernel_route("cuda").compiler == "NVRTC"


def test_the_route_is_known_before_anything_is_compiled(
    no_nvcc, found_nvrtc, imitation, tmp_path, monkeypatch
):
    before = count_compilations(imitation)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(KernelsUnavailableError, match="no GPU is visible"):
        kernel_route("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    route = kernel_route("cuda")
    assert (route.compiler, route.count_built()) == ("NVRTC", 0)
    assert route.folder.parent == tmp_path / "cache" and len(route.parts) == len(INSTANCES)
    assert count_compilations(imitation) == before and load.loaded == {}


def test_doctor_says_what_of_nvrtc_is_in_the_cache(make_program, monkeypatch):
    program, instances = make_program(), INSTANCES
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for built, state in (
        ([], "not in the cache yet"),
        (instances[:3], f"3 of {len(instances)} in the cache"),
        (instances, "in the cache"),
    ):
        program.build(["sm_90"], built)
        first, *files = doctor.kernels_and_files("cuda")
        assert first == f"by NVRTC, {state} ({program.folder})"
        assert len(files) == len(built)
        assert all(file.startswith(f"trusted: {program.folder}/sm_90-") for file in files)
    program.folder.chmod(0o777)
    (line,) = doctor.kernels_and_files("cuda")
    assert line.startswith("none: ") and "every user can write to" in line


def test_build_kernels_compiles_every_instance(make_program, imitation, monkeypatch, capsys):
    program, before = make_program(), count_compilations(imitation)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert main(["build-kernels", "cuda"]) == 0
    printed = capsys.readouterr().out
    assert "cuda: NVRTC compiles" in printed and "cuda: built by NVRTC in" in printed
    assert str(program.folder) in printed
    assert len(list(program.folder.glob("*/done"))) == len(INSTANCES)
    assert main(["build-kernels", "cuda"]) == 0
    assert capsys.readouterr().out == f"cuda: already in {program.folder} (by NVRTC)\n"
    assert count_compilations(imitation) == before + len(INSTANCES)
