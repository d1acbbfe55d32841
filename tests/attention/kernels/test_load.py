"""Whatever happens while the kernels are built, the process ends up with a backend and a reason."""

import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from adaptive_longformer.attention import explain_backends, sparse_attention
from adaptive_longformer.attention.kernels import cache as kernel_cache
from adaptive_longformer.attention.kernels import load as extension
from adaptive_longformer.patterns import SlidingWindow

pytestmark = pytest.mark.skipif(
    shutil.which("c++") is None or sys.platform == "win32", reason="no C++ compiler (c++)"
)

SCRIPT = """
import sys
from pathlib import Path
from adaptive_longformer.attention.kernels import load as extension
extension.SOURCES = Path(sys.argv[1])
print(extension.kernel_library("cpu").answer())
"""
# Four processes, for which the slow imports are done once.
AT_ONCE = """
import os
import sys
from pathlib import Path
from adaptive_longformer.attention.kernels import load as extension
extension.SOURCES = Path(sys.argv[1])
children = []
while len(children) < 3 and 0 not in children:
    children.append(os.fork())
os.write(1, f"{extension.kernel_library('cpu').answer()} ".encode())
if 0 not in children:
    for child in children:
        os.waitpid(child, 0)
"""


def start_process(sandbox, script=SCRIPT):
    return subprocess.Popen(
        [sys.executable, "-c", script, str(sandbox / "csrc")], stdout=subprocess.PIPE, text=True
    )


def test_builds_once_and_then_loads(sandbox, monkeypatch):
    assert extension.kernel_library("cpu").answer() == 42
    folder = extension.build_folder("cpu")
    assert folder.stat().st_mode & 0o777 == 0o700
    built = sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir())
    extension.forget()
    monkeypatch.setenv("ADAPTIVE_LONGFORMER_KERNELS", "cached")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert extension.kernel_library("cpu").answer() == 42
    assert sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir()) == built


def test_other_sources_get_another_folder(sandbox):
    before = extension.build_folder("cpu")
    (sandbox / "csrc" / "cpu" / "answer.cpp").write_text('extern "C" int answer() { return 43; }')
    assert extension.build_folder("cpu") != before


def test_a_killed_build_is_repeated(sandbox):
    folder = extension.build_folder("cpu")
    folder.mkdir(parents=True, mode=0o700)
    (folder / "lock").touch()  # torch's own, left by a killed builder: it would wait for ever
    (folder / "adaptive_longformer_cpu_0.so").write_text("half a library")
    (folder.parent / f"{folder.name}.lock").touch()
    assert extension.kernel_library("cpu").answer() == 42


def test_processes_that_build_at_once_all_get_the_library(sandbox):
    process = start_process(sandbox, AT_ONCE)
    assert process.communicate(timeout=100)[0].split() == ["42"] * 4


def test_a_lock_dies_with_its_holder(sandbox):
    folder = extension.build_folder("cpu")
    folder.parent.mkdir(mode=0o700)
    hold = "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.flock(file, 2)"
    hold += "; print('held', flush=True); time.sleep(99)"
    command = [sys.executable, "-c", hold, f"{folder}.lock"]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    process = start_process(sandbox)
    time.sleep(0.5)
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert process.communicate(timeout=100)[0].strip() == "42"


def test_a_lock_that_is_never_released_times_out(sandbox, monkeypatch):
    import fcntl

    monkeypatch.setattr(kernel_cache, "LOCK_TIMEOUT", 0.2)
    folder = extension.build_folder("cpu")
    folder.parent.mkdir(mode=0o700)
    with open(f"{folder}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process has held" in (extension.why_unavailable("cpu") or "")


@pytest.mark.parametrize(
    "variable,value,reason",
    [
        ("ADAPTIVE_LONGFORMER_KERNELS", "off", "is 'off'"),
        ("ADAPTIVE_LONGFORMER_KERNELS", "cached", "holds no finished build"),
        ("ADAPTIVE_LONGFORMER_KERNELS", "yes", "'on', 'cached' or 'off' is allowed"),
        ("CXX", "no-such-compiler", "no C++ compiler: no-such-compiler was not found"),
        ("CXX", "", "no C++ compiler: an empty CXX was not found"),
        ("CXX", "false", "the build failed"),
        ("ADAPTIVE_LONGFORMER_CACHE", "/proc/nowhere", "names a folder that can be written"),
    ],
)
def test_each_obstacle_is_named_and_another_backend_runs(
    sandbox, monkeypatch, caplog, variable, value, reason
):
    monkeypatch.setenv(variable, value)
    query = torch.randn(1, 1, 1000, 8)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            output = sparse_attention(query, query, query, SlidingWindow(8))
    assert reason in (explain_backends(query, query, query, SlidingWindow(8))["cpp"] or "")
    assert len(caplog.records) == 1 and reason in caplog.text
    expected = sparse_attention(query, query, query, SlidingWindow(8), backend="blocked")
    assert torch.equal(output, expected)
    with pytest.raises(ValueError, match="backend 'cpp' cannot run this call"):
        sparse_attention(query, query, query, SlidingWindow(8), backend="cpp")


def test_a_source_that_does_not_compile_is_named(sandbox):
    (sandbox / "csrc" / "cpu" / "answer.cpp").write_text("int answer( { }")
    assert "error" in (extension.why_unavailable("cpu") or "")
    assert not (extension.build_folder("cpu") / "done").exists()


def test_a_cache_that_everybody_can_write_to_is_refused(sandbox):
    cache = sandbox / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    assert "every user can write to" in (extension.why_unavailable("cpu") or "")
    cache.chmod(0o700)
    extension.forget()
    assert extension.kernel_library("cpu").answer() == 42
    extension.build_folder("cpu").chmod(0o777)
    extension.forget()
    assert "every user can write to" in (extension.why_unavailable("cpu") or "")


def test_a_user_without_a_home_is_told_to_name_a_folder(sandbox, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setenv("ADAPTIVE_LONGFORMER_CACHE", "")  # as good as not set
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    reason = extension.why_unavailable("cpu") or ""
    assert "home directory" in reason and "ADAPTIVE_LONGFORMER_CACHE" in reason


def test_a_read_only_cache_is_named(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o500)
    script = (
        "from adaptive_longformer.attention.kernels import load as e; print(e.why_unavailable('cpu'))"
    )
    command = [sys.executable, "-c", script]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root can write everywhere, and there is no setpriv to take that away")
        command = ["setpriv", "--bounding-set=-all", *command]
    environment = {**os.environ, "ADAPTIVE_LONGFORMER_CACHE": str(cache)}
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "ADAPTIVE_LONGFORMER_CACHE names a folder that can be written" in told.stdout


def test_cuda_kernels_need_a_torch_with_cuda(sandbox):
    shutil.copytree(sandbox / "csrc" / "cpu", sandbox / "csrc" / "cuda")
    if torch.version.cuda is not None:
        pytest.skip("this torch is built with CUDA")
    assert extension.why_unavailable("cuda") == "this torch is built without CUDA"


def test_a_toolkit_without_a_fitting_nvcc_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    for script, reason in (
        (None, "no nvcc: .* does not exist"),
        ("echo release 12.8, V12.8.93", "nvcc is of CUDA 12, torch of CUDA 13"),
        ("exit 1", "nvcc is of an unknown version, torch of CUDA 13"),
    ):
        if script is not None:
            nvcc.write_text(f"#!/bin/sh\n{script}\n")
            nvcc.chmod(0o700)
        with pytest.raises(extension.ExtensionUnavailableError, match=reason):
            extension._check_cuda_compiler(str(tmp_path))


def test_libraries_are_looked_for_where_nvcc_says_they_are(tmp_path):
    nvcc = tmp_path / "nvcc"
    said = '#$ TOP=/far/bin/..\n#$ LIBRARIES=  "-L/far/lib/stubs" "-L/far/lib"\n'
    nvcc.write_text(f"#!/bin/sh\necho '{said}' >&2\n")
    nvcc.chmod(0o700)
    assert extension._link_flags(nvcc) == ["-L/far/lib/stubs", "-L/far/lib"]


def test_nothing_is_built_at_import(sandbox):
    subprocess.run([sys.executable, "-c", "import adaptive_longformer.attention"], check=True)
    assert not (sandbox / "cache").exists()


def test_nvcc_needs_a_gpu_or_a_list_of_architectures_to_compile_for(tmp_path, monkeypatch):
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho release 13.0, V13.0.88\n")
    nvcc.chmod(0o700)
    with pytest.raises(extension.ExtensionUnavailableError, match="no GPU is visible"):
        extension._check_compilers("cuda")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    extension._check_compilers("cuda")


def test_a_build_for_listed_architectures_serves_where_these_are_listed(monkeypatch):
    """Made where no GPU is visible, it is found where one is; another list is another build."""
    folders = []
    for listed, num_gpus in (("9.0", 0), ("9.0", 1), ("8.0", 1), ("", 1)):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=num_gpus: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
        folders.append(extension.build_folder("cuda"))
    assert folders[0] == folders[1] and len(set(folders)) == 3
