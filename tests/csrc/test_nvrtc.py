"""The CUDA kernels without nvcc: compiled by NVRTC where it is, and the way there and to the launch
with an imitation of NVRTC and of the driver, which runs the kernels in the emulator.
"""

import ctypes
import shutil

import pytest
import torch
from emulation import CUDA_SOURCES, compile_emulated
from test_emulated_cuda import SEED, TOLERANCE, errors, masks, random_layout

from adaptive_longformer import doctor
from adaptive_longformer.attention.backends import cuda as compiled_cuda
from adaptive_longformer.attention.kernels import cuda_driver, cuda_program
from adaptive_longformer.attention.kernels import load as extension
from adaptive_longformer.attention.kernels.cache import ExtensionUnavailableError
from adaptive_longformer.attention.kernels.cuda_launches import KERNELS, Instance
from adaptive_longformer.attention.kernels.cuda_program import SOURCE, CudaProgram
from adaptive_longformer.attention.kernels.nvrtc import Nvrtc, find_nvrtc
from adaptive_longformer.attention.kernels.route import KernelRoute, kernel_route
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
        nvrtc = find_nvrtc(torch.version.cuda)
    except ExtensionUnavailableError as error:
        pytest.skip(str(error))
    headers = {path.name: path.read_text() for path in CUDA_SOURCES.glob("*.cuh")}
    expressions = [instance.expression(kernel) for kernel in KERNELS]
    program = nvrtc.compile(SOURCE, headers, expressions, architecture)
    assert program.cubin.startswith(b"\x7fELF")
    for kernel, expression in zip(KERNELS, expressions, strict=True):
        name = program.names[expression]
        assert f"{kernel}_kernel" in name and name.encode() in program.cubin


@pytest.fixture(scope="session")
def imitation(tmp_path_factory):
    """The path of a library that is NVRTC and driver at once."""
    return compile_emulated("fake_cuda.cpp", tmp_path_factory.mktemp("fake_cuda"))


@pytest.fixture
def make_program(imitation, tmp_path, monkeypatch):
    """Makes programs with a cache of their own, for a GPU of compute capability 9.0."""
    monkeypatch.setattr(cuda_driver, "LIBRARY", str(imitation))
    monkeypatch.setattr(cuda_program, "architecture_of", lambda device: "sm_90")
    monkeypatch.delenv("ADAPTIVE_LONGFORMER_KERNELS", raising=False)

    def make(sources=CUDA_SOURCES):
        nvrtc = Nvrtc(ctypes.CDLL(str(imitation)), "imitation")
        driver = cuda_driver.CudaDriver()
        program = CudaProgram(nvrtc, driver, sources, tmp_path / "cache")
        monkeypatch.setattr(extension, "_loaded", {"cuda": program})
        return program

    return make


def count_compilations(imitation):
    return ctypes.CDLL(str(imitation)).fake_compilations()


@pytest.mark.parametrize(("head_dim", "query_block"), [(32, 64), (128, 128)])
def test_kernels_launched_by_the_driver_match_reference(
    make_program, monkeypatch, head_dim, query_block
):
    make_program()
    original = compiled_cuda.gradient_items
    monkeypatch.setattr(compiled_cuda, "gradient_items", lambda layout: original(layout, 2))
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
    with pytest.raises(ExtensionUnavailableError, match=r"'cached' and .* does not exist"):
        errors(layout, 70, dtype=torch.float16)


def test_machine_code_without_its_names_is_compiled_again(make_program, imitation):
    program = make_program()
    instance = Instance(1, 32, 64)
    program.build([instance], ["sm_90"])
    (names,) = program.folder.glob("*.json")
    names.unlink()
    next(program.folder.glob("*.cubin")).write_bytes(b"half of")
    before = count_compilations(imitation)
    errors(random_layout(70), 70)
    assert count_compilations(imitation) == before + 1


def test_other_sources_get_another_folder(make_program, tmp_path):
    changed = tmp_path / "cuda"
    shutil.copytree(CUDA_SOURCES, changed)
    (changed / "tile.cuh").write_text((changed / "tile.cuh").read_text() + "// changed\n")
    assert make_program().folder != make_program(changed).folder


def test_what_does_not_compile_is_named(make_program, tmp_path):
    incomplete = tmp_path / "cuda"
    shutil.copytree(CUDA_SOURCES, incomplete)
    (incomplete / "tile.cuh").unlink()
    with pytest.raises(ExtensionUnavailableError, match=r'cannot open source file "tile.cuh"'):
        make_program(incomplete).build([Instance(1, 32, 64)], ["sm_90"])
    with pytest.raises(ExtensionUnavailableError, match=r"NVRTC 13\.0 does not compile for sm_10"):
        make_program().build([Instance(1, 32, 64)], ["sm_10"])


def test_a_cache_that_everybody_can_write_to_is_refused(make_program):
    program = make_program()
    program.build([Instance(1, 32, 64)], ["sm_90"])
    program.folder.chmod(0o777)
    with pytest.raises(ExtensionUnavailableError, match="every user can write to"):
        errors(random_layout(70), 70)


def test_only_the_nvrtc_of_torchs_version_of_cuda_is_taken(imitation, tmp_path, monkeypatch):
    (tmp_path / "lib64").mkdir()
    for name in ("libnvrtc.so.99", "libnvrtc-builtins.so.99.1"):
        shutil.copy(imitation, tmp_path / "lib64" / name)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert find_nvrtc("99.1").path == str(tmp_path / "lib64" / "libnvrtc.so.99")
    with pytest.raises(ExtensionUnavailableError, match=r"libnvrtc\.so\.98 was not found"):
        find_nvrtc("98.0")


def take_nvcc_away(monkeypatch):
    def no_nvcc(kind):
        raise ExtensionUnavailableError("no nvcc: it was not found")

    monkeypatch.setattr(extension, "_check_compilers", no_nvcc)
    monkeypatch.setattr(extension, "is_built", lambda kind: False)
    monkeypatch.setattr(extension, "_loaded", {})
    monkeypatch.setattr(torch.version, "cuda", "98.0")
    monkeypatch.delenv("ADAPTIVE_LONGFORMER_KERNELS", raising=False)


def test_nvrtc_stands_in_for_nvcc_and_both_reasons_are_told(imitation, monkeypatch, caplog):
    take_nvcc_away(monkeypatch)
    reason = extension.why_unavailable("cuda") or ""
    assert "no nvcc: it was not found; no NVRTC: libnvrtc.so.98 was not found" in reason
    assert len(caplog.records) == 1 and reason in caplog.text
    extension.forget()
    monkeypatch.setattr(cuda_driver, "LIBRARY", str(imitation))
    nvrtc = Nvrtc(ctypes.CDLL(str(imitation)), "imitation")
    monkeypatch.setattr(extension, "find_nvrtc", lambda version: nvrtc)
    assert extension.why_unavailable("cuda") is None
    assert isinstance(extension.kernel_library("cuda"), CudaProgram)
    assert len(caplog.records) == 1


def test_a_build_by_nvcc_that_fails_leaves_it_to_nvrtc(make_program, monkeypatch):
    program = make_program()
    take_nvcc_away(monkeypatch)

    def failed_build(kind):
        raise ExtensionUnavailableError("the build failed")

    monkeypatch.setattr(extension, "_check_compilers", lambda kind: None)
    monkeypatch.setattr(extension, "_load_built", failed_build)
    monkeypatch.setattr(extension, "cuda_program", lambda: program)
    assert kernel_route("cuda").compiler == "nvcc"
    assert extension.kernel_library("cuda") is program
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert kernel_route("cuda").compiler == "NVRTC"


def test_the_route_is_known_before_anything_is_compiled(
    make_program, imitation, tmp_path, monkeypatch
):
    folder, before = make_program().folder, count_compilations(imitation)
    take_nvcc_away(monkeypatch)
    monkeypatch.setenv("ADAPTIVE_LONGFORMER_CACHE", str(tmp_path / "cache"))
    nvrtc = Nvrtc(ctypes.CDLL(str(imitation)), "imitation")
    monkeypatch.setattr(extension, "find_nvrtc", lambda version: nvrtc)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ExtensionUnavailableError, match="no GPU is visible"):
        kernel_route("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    num_instances = len(compiled_cuda.INSTANCES)
    assert kernel_route("cuda") == KernelRoute("NVRTC", folder, 0, num_instances)
    assert count_compilations(imitation) == before and extension._loaded == {}


def test_doctor_says_what_of_nvrtc_is_in_the_cache(make_program, monkeypatch):
    program, instances = make_program(), compiled_cuda.INSTANCES
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for built, state in (
        ([], "not in the cache yet"),
        (instances[:3], f"3 of {len(instances)} in the cache"),
        (instances, "in the cache"),
    ):
        program.build(built, ["sm_90"])
        assert doctor._kernels("cuda") == f"by NVRTC, {state} ({program.folder})"
    program.folder.chmod(0o777)
    assert "none: every user can write to" in doctor._kernels("cuda")


def test_build_kernels_compiles_every_instance(make_program, imitation, monkeypatch, capsys):
    program, before = make_program(), count_compilations(imitation)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert main(["build-kernels", "cuda"]) == 0
    printed = capsys.readouterr().out
    assert "cuda: NVRTC compiles" in printed and "cuda: built by NVRTC in" in printed
    assert str(program.folder) in printed
    assert len(list(program.folder.glob("*.json"))) == len(compiled_cuda.INSTANCES)
    assert main(["build-kernels", "cuda"]) == 0
    assert capsys.readouterr().out == f"cuda: already in {program.folder} (by NVRTC)\n"
    assert count_compilations(imitation) == before + len(compiled_cuda.INSTANCES)
