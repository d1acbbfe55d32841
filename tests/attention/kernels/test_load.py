"""Whatever happens while the kernels are built or loaded, the process ends up with a backend and a
reason.
"""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adaptive_longformer import doctor
from adaptive_longformer.attention import explain_backends, sparse_attention
from adaptive_longformer.attention.kernels import build, load
from adaptive_longformer.patterns import SlidingWindow

pytestmark = pytest.mark.skipif(
    shutil.which("c++") is None or sys.platform == "win32", reason="no C++ compiler (c++)"
)

# Four processes, for which the slow imports are done once.
AT_ONCE = """
import os
import sys
from pathlib import Path
from adaptive_longformer.attention.kernels import build, load
build.SOURCES = Path(sys.argv[1])
children = []
while len(children) < 3 and 0 not in children:
    children.append(os.fork())
os.write(1, f"{load.kernel_library('cpu').answer()} ".encode())
if 0 not in children:
    for child in children:
        os.waitpid(child, 0)
"""


def answer():
    """The kernels as a new process would find them."""
    load.forget()
    return load.kernel_library("cpu").answer()


def source(sandbox):
    return sandbox / "csrc" / "cpu" / "answer.cpp"


def test_builds_once_and_then_loads(sandbox, monkeypatch):
    assert answer() == 42
    folder = build.library_folder("cpu")
    built = sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir())
    monkeypatch.setenv("ADAPTIVE_LONGFORMER_KERNELS", "cached")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert answer() == 42
    assert sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir()) == built


def test_two_versions_share_a_cache(sandbox):
    """Each is built once and finds its own, also when both are loaded by one process."""
    versions = [source(sandbox).read_text(), 'extern "C" int answer() { return 43; }']
    for _ in range(2):
        for version, expected in zip(versions, (42, 43), strict=True):
            source(sandbox).write_text(version)
            assert answer() == expected
    assert len(list((sandbox / "cache").glob("cpu-*/done"))) == 2


def test_processes_that_build_at_once_all_get_the_library(sandbox):
    command = [sys.executable, "-c", AT_ONCE, str(sandbox / "csrc")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert run.stdout.split() == ["42"] * 4


@pytest.mark.parametrize("change", ["cut", "flipped"])
def test_a_damaged_library_is_built_anew_instead_of_ending_the_process(sandbox, caplog, change):
    assert answer() == 42
    library = build.library_folder("cpu") / "kernels.so"
    # Not changed in place, since this process has it mapped.
    content = library.read_bytes()
    library.unlink()
    if change == "flipped":
        content = (
            content[:4000] + bytes(byte ^ 0xFF for byte in content[4000:4040]) + content[4040:]
        )
    library.write_bytes(content[:4096] if change == "cut" else content)
    library.chmod(0o600)
    with caplog.at_level(logging.WARNING):
        assert answer() == 42
    assert [record.getMessage() for record in caplog.records] == [
        f"{library} is damaged: it is not what was built; it is built anew"
    ]


def test_what_is_loaded_is_what_was_checked(sandbox, monkeypatch):
    """A file that takes the library's name between check and load is not run."""
    assert answer() == 42
    other = sandbox / "other"
    other.mkdir()
    source(sandbox).write_text('extern "C" int answer() { return 666; }')
    build.build_library("cpu", other)
    source(sandbox).write_text('extern "C" int answer() { return 42; }')
    find_or_make = load.find_or_make

    def find_and_exchange(folder, make):
        found = find_or_make(folder, make)
        os.replace(other / "kernels.so", found.path)
        return found

    monkeypatch.setattr(load, "find_or_make", find_and_exchange)
    assert answer() == 42


def test_a_library_that_lacks_a_symbol_is_a_reason(sandbox):
    source(sandbox).write_text('extern "C" { int missing(); int answer() { return missing(); } }')
    reason = load.why_unavailable("cpu") or ""
    folder = build.library_folder("cpu")
    assert "missing" in reason and f"deleting {folder} builds it anew" in reason


@pytest.mark.parametrize(
    "variable,value,reason",
    [
        ("ADAPTIVE_LONGFORMER_KERNELS", "off", "is 'off'"),
        ("ADAPTIVE_LONGFORMER_KERNELS", "cached", "holds no finished build"),
        ("ADAPTIVE_LONGFORMER_KERNELS", "yes", "'on', 'cached' or 'off' is allowed"),
        ("CXX", "no-such-compiler", "no C++ compiler: no-such-compiler was not found"),
        ("CXX", "", "no C++ compiler: an empty CXX was not found"),
        ("CXX", "c++ 'unfinished", 'CXX is "c++ \'unfinished"'),
        ("CXX", "false", "the build failed: Command '['false'"),
        ("ADAPTIVE_LONGFORMER_CACHE", "/proc/nowhere", "names a folder that can be written"),
        ("ADAPTIVE_LONGFORMER_CACHE", "/tmp", "every user can write to /tmp"),
    ],
)
def test_each_obstacle_is_named_and_another_backend_runs(
    sandbox, monkeypatch, caplog, variable, value, reason
):
    if value == "/tmp" and not os.stat("/tmp").st_mode & 0o002:
        pytest.skip("nobody else can write to /tmp here")
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


def test_a_failed_build_leaves_nothing(sandbox):
    source(sandbox).write_text("int answer( { }")
    assert "error" in (load.why_unavailable("cpu") or "")
    folder = build.library_folder("cpu")
    assert [path.name for path in folder.parent.iterdir()] == [f"{folder.name}.lock"]


def test_a_user_without_a_home_is_told_to_name_a_folder(sandbox, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setenv("ADAPTIVE_LONGFORMER_CACHE", "")  # as good as not set
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    reason = load.why_unavailable("cpu") or ""
    assert "home directory" in reason and "ADAPTIVE_LONGFORMER_CACHE" in reason


def test_a_read_only_cache_is_named(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o500)
    script = "from adaptive_longformer.attention.kernels import load; "
    command = [sys.executable, "-c", script + "print(load.why_unavailable('cpu'))"]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root can write everywhere, and there is no setpriv to take that away")
        command = ["setpriv", "--bounding-set=-all", *command]
    environment = {**os.environ, "ADAPTIVE_LONGFORMER_CACHE": str(cache)}
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "ADAPTIVE_LONGFORMER_CACHE names a folder that can be written" in told.stdout


def test_cuda_kernels_need_a_torch_with_cuda(sandbox):
    if torch.version.cuda is not None:
        pytest.skip("this torch is built with CUDA")
    assert load.why_unavailable("cuda") == "this torch is built without CUDA"


def test_nothing_is_built_at_import(sandbox):
    subprocess.run([sys.executable, "-c", "import adaptive_longformer.attention"], check=True)
    assert not (sandbox / "cache").exists()


def test_doctor_says_which_file_it_trusts_and_why(sandbox):
    (line,) = doctor.kernels_and_files("cpu")
    folder = build.library_folder("cpu")
    assert line == f"by c++, not in the cache yet ({folder})"
    assert answer() == 42
    load.forget()
    line, trusted = doctor.kernels_and_files("cpu")
    assert line == f"by c++, in the cache ({folder})"
    size = (folder / "kernels.so").stat().st_size
    start = f"trusted: {folder}/kernels.so: owner {os.geteuid()}, mode 600, {size} bytes"
    assert trusted.startswith(start) and "as recorded" in trusted
    (folder / "kernels.so").chmod(0o660)
    line, untrusted = doctor.kernels_and_files("cpu")
    assert line == f"by c++, not in the cache yet ({folder})"
    assert untrusted.startswith("not trusted, built anew at the next use: its group can write to")
    folder.parent.chmod(0o770)
    (line,) = doctor.kernels_and_files("cpu")
    assert line.startswith("none: ") and f"its group can write to {folder.parent}" in line
