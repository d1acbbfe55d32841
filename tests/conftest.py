"""Fixtures that tests of several folders use."""

import pytest
from triton_on_cpu import interpreter

from adaptive_longformer.attention.kernels import build
from adaptive_longformer.testing import use_library


@pytest.fixture
def no_library():
    """Nothing is loaded, as at the start of a process."""
    with use_library("cpu", None), use_library("cuda", None):
        yield


@pytest.fixture
def sandbox(no_library, tmp_path, monkeypatch):
    """A cache of its own and a small source that compiles in a moment."""
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "csrc" / "cpu" / "answer.cpp").write_text('extern "C" int answer() { return 42; }')
    monkeypatch.setattr(build, "SOURCES", tmp_path / "csrc")
    monkeypatch.setenv("ADAPTIVE_LONGFORMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ADAPTIVE_LONGFORMER_KERNELS", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path


@pytest.fixture(scope="session")
def triton_interpreter():
    """Calls a function, by module and name, where Triton interprets; see `triton_on_cpu`."""
    with interpreter() as call:
        yield call
